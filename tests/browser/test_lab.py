"""Notebooks in a JupyterLab as the kit starts it, in Chromium: all cells run, every slider moved by keyboard."""

import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
# Those with a slider; that of 90, which fills a page, is opened in Voila (test_console_voila.py).
SLIDER = re.compile(r"\b(explore|scrub|latency_test|open_playground|open_demo)\(")
ALIVE = sorted(file.stem for file in NOTEBOOKS.glob("*.ipynb") if SLIDER.search(file.read_text()))
SHORT = ("02", "04", "07")  # the others in the long series
RUN_S, MOVE_S = 300, 120  # on a busy machine

# The kit's own server, over copies, since JupyterLab saves what it shows.
SERVE = """
from pathlib import Path
from dispersive_kit.study import lab
lab.notebooks_folder = lambda: Path({folder!r})
lab.serve_lab({port}, browser=False)
"""

# What stands in the output of a slider: the pictures one can see, and how far bars are filled.
SHOWN = """
control => {
  const output = control.closest('.jp-OutputArea-output');
  const pictures = [...output.querySelectorAll('img, svg[role=img]')].filter(one => one.checkVisibility())
    .map(one => one.src ?? one.outerHTML);
  const bars = [...output.querySelectorAll('.progress-bar')].map(one => one.style.width);
  return JSON.stringify([pictures, bars]);
}
"""

# How much higher than the part of the window that shows the notebook a slider and its picture are together.
TOO_HIGH = """
control => control.closest('.jp-OutputArea-output').offsetHeight - control.closest('.jp-Notebook').clientHeight
"""

# Cells whose code is wider than they are.
CUT_OFF = """
() => [...document.querySelectorAll('.jp-CodeCell .cm-scroller')]
  .filter(one => one.scrollWidth > one.clientWidth).length
"""

# Milliseconds from each key press to the frame after the one in which another picture was there.
STOPWATCH = f"""
control => {{
  const output = control.closest('.jp-OutputArea-output'), shown = {SHOWN};
  let pressed = null, before = shown(control);
  window.taken = [];
  control.addEventListener('keydown', event => {{ pressed = event.timeStamp; }}, true);
  new MutationObserver(() => {{
    const since = pressed, now = shown(control);
    if (since === null || now === before) return;
    pressed = null;
    before = now;
    requestAnimationFrame(() => requestAnimationFrame(drawn => window.taken.push(drawn - since)));
  }}).observe(output, {{attributes: true, childList: true, subtree: true}});
}}
"""


class Lab:
    """A running JupyterLab: `folder` holds the notebooks."""

    def __init__(self, folder: Path, browser: Browser) -> None:
        self.folder, self.browser = folder, browser
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        own = {"CONFIG": "config", "DATA": "data", "RUNTIME": "runtime"}
        places = {f"JUPYTER_{name}_DIR": str(folder.parent / place) for name, place in own.items()}
        places |= {f"JUPYTERLAB_{name}_DIR": str(folder.parent / name) for name in ("SETTINGS", "WORKSPACES")}
        kit = {"DISPERSIVE_KIT_MODE": "smoke", "DISPERSIVE_KIT_RUNS": str(folder.parent / "runs")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE.format(folder=str(folder), port=port)],
            env={**os.environ, **places, **kit},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = self.listen()
        self.base, self.token = re.search(r"^open (\S+)/lab\?token=(\w+)$", said, re.MULTILINE).groups()

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

    def close(self, page: Page) -> None:
        page.close()
        for kernel in json.loads(self.ask("kernels")):
            self.ask(f"kernels/{kernel['id']}", "DELETE")

    def run_all(self, name: str) -> Page:
        """Open a notebook, and run all of its cells."""
        page = self.browser.new_page(viewport={"width": 1280, "height": 720})
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("request", lambda request: page.faults.extend(self.elsewhere(request.url)))
        # A workspace of its own: in a common one the notebooks of earlier pages are opened again.
        page.goto(f"{self.base}/lab/workspaces/{name}/tree/{name}.ipynb?token={self.token}")
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=1000 * RUN_S)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        ended = page.locator(".jp-OutputArea-output").filter(has_text=re.compile(r"done in \d+ s"))
        ended.or_(tracebacks(page)).first.wait_for(timeout=1000 * RUN_S)
        return page

    def elsewhere(self, address: str) -> list[str]:
        """The address, if it is not of this server."""
        own = tuple(f"{protocol}://{self.base.partition('//')[2]}/" for protocol in ("http", "ws"))
        return [] if address.startswith((*own, "data:", "blob:")) else [address]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, chromium: Browser) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    shutil.copytree(NOTEBOOKS, folder)
    running = Lab(folder, chromium)
    yield running
    running.process.terminate()  # its kernels with it
    running.process.wait(RUN_S)


def tracebacks(page: Page) -> Locator:
    kinds = ("error", "stderr")
    return page.locator(", ".join(f'[data-mime-type="application/vnd.jupyter.{kind}"]' for kind in kinds))


def controls(page: Page) -> list[Locator]:
    return page.locator(".jp-OutputArea .noUi-handle, .jp-OutputArea .widget-dropdown select").all()


def keys(control: Locator) -> tuple[str, str]:
    """A key that moves the control, and the one that moves it back."""
    is_menu = control.evaluate("e => e.matches('select')")
    forth, back = ("ArrowDown", "ArrowUp") if is_menu else ("ArrowRight", "ArrowLeft")
    at_start = "e => e.selectedIndex == 0" if is_menu else "e => e.ariaValueNow == e.ariaValueMin"
    return (forth, back) if control.evaluate(at_start) else (back, forth)


def wait_for(page: Page, condition: str, *arguments: object) -> None:
    page.wait_for_function(condition, arg=list(arguments), timeout=1000 * MOVE_S)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.startswith(SHORT) else pytest.mark.long) for name in ALIVE]
)
def test_all_cells_run_and_each_slider_changes_the_picture_below_it_and_back(
    lab: Lab, name: str, touching: str
) -> None:
    page = lab.run_all(name)
    expect(tracebacks(page)).to_have_count(0)
    assert page.evaluate(CUT_OFF) == 0
    assert page.evaluate(touching) == []
    moved = controls(page)
    assert moved
    for control in moved:
        assert control.evaluate(TOO_HIGH) <= 0
        element, before = control.element_handle(), control.evaluate(SHOWN)
        forth, back = keys(control)
        control.focus()
        page.keyboard.press(forth)
        wait_for(page, f"([control, before]) => ({SHOWN})(control) != before", element, before)
        page.keyboard.press(back)
        wait_for(page, f"([control, before]) => ({SHOWN})(control) == before", element, before)
    assert not page.faults
    expect(tracebacks(page)).to_have_count(0)
    lab.close(page)


def latency(page: Page, control: Locator, presses: int = 30) -> float:
    """Median milliseconds from key to screen, to and fro over the control."""
    control.focus()
    control.evaluate(STOPWATCH)
    forth, back = keys(control)
    for press in range(1, presses + 1):
        page.keyboard.press(forth if (press - 1) % 6 < 3 else back)
        wait_for(page, "([press]) => window.taken.length == press", press)
    return statistics.median(page.evaluate("window.taken"))


def test_frames_are_swapped_within_60_ms_of_a_slider_that_asks_nobody(lab: Lab) -> None:
    """On the page of notebook 02, to which the control is added."""
    notebook = nbformat.read(lab.folder / "02_denoiser_2d.ipynb", as_version=4)
    notebook.cells.insert(-1, nbformat.v4.new_code_cell("control = widgets.latency_test()"))
    nbformat.write(notebook, lab.folder / "timed.ipynb")
    page = lab.run_all("timed")
    scrubber = page.locator(".jp-OutputArea-output", has_text="training step").locator(".noUi-handle")
    alone = page.locator(".jp-OutputArea-output:has(.progress) .noUi-handle").first
    floor, swap = latency(page, alone), latency(page, scrubber)
    print(f"key to screen: {floor:.0f} ms in the browser alone, {swap:.0f} ms for a frame")
    assert swap <= floor + 60
    lab.close(page)
