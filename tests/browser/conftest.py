"""One Chromium and one server of the kit for the tests that look at a page. In CI a missing Chromium is a failure."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
QUIET = ("gpu", "background-networking", "component-update", "sync")
FLAGS = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
READY_S = 300  # on a busy machine

# The kit's own server, over copies, since JupyterLab saves what it shows.
SERVE = """
from pathlib import Path
from dispersive_kit.study import lab
lab.notebooks_folder = lambda: Path({folder!r})
lab.serve_lab({port}, browser=False, page={page!r})
"""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder drives Chromium, in one worker: two browsers on two cores would time each other."""
    for item in items:
        if item.path.parent.name == "browser":
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.xdist_group("browser"))
            if shutil.which("chromium") is None and not os.environ.get("CI"):
                item.add_marker(pytest.mark.skip(reason="no chromium on this machine"))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser
        browser.close()


def watched(browser: Browser, own: tuple[str, ...], **how: object) -> Page:
    """A page of a projector's size; its `faults` are errors, and addresses that do not begin with one of `own`."""
    page = browser.new_page(viewport={"width": 1280, "height": 720}, **how)
    page.set_default_timeout(1000 * READY_S)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda said: page.faults.append(said.text) if said.type == "error" else None)
    page.on("request", lambda asked: page.faults.extend([] if asked.url.startswith(own) else [asked.url]))
    return page


@pytest.fixture(scope="session")
def busy() -> Callable[[Page], Callable[[], float]]:
    """Of a page: the seconds of processor time it has taken until now, since other tests share the cores."""

    def of(page: Page) -> Callable[[], float]:
        cdp = page.context.new_cdp_session(page)
        cdp.send("Performance.enable", {"timeDomain": "threadTicks"})
        return lambda: {m["name"]: m["value"] for m in cdp.send("Performance.getMetrics")["metrics"]}["TaskDuration"]

    return of


class Server:
    """JupyterLab, and Voila beside it, as `dispersive-kit console` starts them, over the copies in `folder`."""

    def __init__(self, folder: Path, browser: Browser) -> None:
        self.folder, self.browser = folder, browser
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        own = {"CONFIG": "config", "DATA": "data", "RUNTIME": "runtime"}
        places = {f"JUPYTER_{name}_DIR": str(folder.parent / place) for name, place in own.items()}
        places |= {f"JUPYTERLAB_{name}_DIR": str(folder.parent / name) for name in ("SETTINGS", "WORKSPACES")}
        kit = {"DISPERSIVE_KIT_MODE": "smoke", "DISPERSIVE_KIT_RUNS": str(folder.parent / "runs")}
        script = SERVE.format(folder=str(folder), port=port, page="voila/render/90_lecture_console.ipynb")
        self.process = subprocess.Popen(
            [sys.executable, "-c", script], env={**os.environ, **places, **kit}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.base, self.console, self.token = re.search(
            r"^open (http://127\.0\.0\.1:\d+)/(voila/\S+)\?token=(\w{48})$", self.listen(), re.MULTILINE
        ).groups()
        self.own = (f"{self.base}/", f"ws{self.base[4:]}/", "data:", "blob:")

    def listen(self) -> str:
        """What it prints until it runs; what follows is read and dropped, or it would wait for a reader."""
        said = ""
        for line in self.process.stdout:
            said += line
            if "is running at" in line:
                threading.Thread(target=self.process.stdout.read, daemon=True).start()
                return said
        raise AssertionError(said)

    def ask(self, path: str, method: str = "GET") -> bytes:
        asked = urllib.request.Request(f"{self.base}/api/{path}?token={self.token}", method=method)
        return urllib.request.urlopen(asked, timeout=20).read()

    def open(self, path: str) -> Page:
        page = watched(self.browser, self.own)
        page.goto(f"{self.base}/{path}?token={self.token}")
        return page

    def close(self, page: Page) -> None:
        page.close()
        for kernel in json.loads(self.ask("kernels")):
            self.ask(f"kernels/{kernel['id']}", "DELETE")


@pytest.fixture(scope="session")
def watch(chromium: Browser) -> Callable[..., Page]:
    return partial(watched, chromium)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, chromium: Browser) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server") / "notebooks"
    shutil.copytree(NOTEBOOKS, folder)
    running = Server(folder, chromium)
    yield running
    running.process.terminate()  # its kernels with it
    running.process.wait(READY_S)
