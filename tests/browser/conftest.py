"""One Chromium for the tests that look at a page: Debian's, headless. In CI its absence is a failure."""

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

# Pairs of a slider's label, its handle and its value, of all that are seen, that touch each other.
TOUCHING = """() => {
  const box = one => {
    const words = document.createRange();
    words.selectNodeContents(one);
    return (one.matches(".noUi-handle") ? one : words).getBoundingClientRect();
  };
  const seen = [...document.querySelectorAll(".widget-hslider :is(.widget-label, .widget-readout, .noUi-handle)")]
    .filter(one => one.checkVisibility() && box(one).width).map(one => [one.textContent || "handle", box(one)]);
  return seen.flatMap(([name, a], i) => seen.slice(i + 1)
    .filter(([, b]) => a.left < b.right + 3 && b.left < a.right + 3 && a.top < b.bottom && b.top < a.bottom)
    .map(([other]) => `${name} and ${other}`));
}"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder drives Chromium, in one worker: two browsers on two cores would time each other."""
    for item in items:
        if item.path.parent.name == "browser":
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.xdist_group("browser"))
            if shutil.which("chromium") is None and not os.environ.get("CI"):
                item.add_marker(pytest.mark.skip(reason="no chromium on this machine"))


@pytest.fixture(scope="session")
def touching() -> str:
    return TOUCHING


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()
