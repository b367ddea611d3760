"""Widgets in a JupyterLab as the kit starts it, in Chromium: all cells run, every control moved by keyboard."""

import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from playwright.sync_api import Locator, Page, expect

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SLIDER = re.compile(r"\b(explore|scrub|latency_test|playground|blind_quiz)\(")
ALIVE = sorted(file.stem for file in NOTEBOOKS.glob("*.ipynb") if SLIDER.search(file.read_text()))
CELLS = (
    "import matplotlib.pyplot as plt\n"
    "from dispersive_kit.views import widgets\nfrom dispersive_kit.views.console import *\n"
    "def view(size, word):\n    figure = plt.figure(figsize=(3, 1))\n    figure.text(0.1, 0.4, word * size)\n"
    "    return figure",
    "widgets.explore(view, {'word': ('ab', 'cd'), 'size': (1, 2, 3, 4, 5, 6)}, alt='{word} {size} times')",
    "widgets.scrub({k: view(k, '#') for k in range(1, 15)}, label='step', alt='{label} signs')",
    "widgets.latency_test()",
    "playground()",
    "widgets.explore(lambda part: view(6 // part, 'x'), {'part': (1, 2, 0)}, alt='x {part}')",
    "print('done in 0 s')",
)

# What one can see of the widget of a control.
SHOWN = """control => JSON.stringify([...control.closest('.dk').querySelectorAll('.picture, progress')]
  .map(one => one.value ?? one.innerHTML))"""
# How much higher than the part of the window that shows the notebook a control and its picture are together.
TOO_HIGH = "control => control.closest('.dk').offsetHeight - control.closest('.jp-Notebook').clientHeight"
# Cells whose code is wider than they are.
CUT_OFF = """() => [...document.querySelectorAll('.jp-CodeCell .cm-scroller')]
  .filter(one => one.scrollWidth > one.clientWidth).length"""
# Milliseconds from each key press to the frame after the one in which something else was there.
STOPWATCH = f"""control => {{
  const shown = {SHOWN};
  let pressed = null, before = shown(control);
  window.taken = [];
  control.addEventListener('keydown', event => {{ pressed = event.timeStamp; }}, true);
  new MutationObserver(() => {{
    const since = pressed, now = shown(control);
    if (since === null || now === before) return;
    [pressed, before] = [null, now];
    requestAnimationFrame(() => requestAnimationFrame(drawn => window.taken.push(drawn - since)));
  }}).observe(control.closest('.dk'), {{ attributes: true, childList: true, subtree: true }});
}}"""


def run_all(server: Any, name: str) -> Page:
    """Open a notebook, and run all of its cells."""
    # A workspace of its own: in a common one the notebooks of earlier pages are opened again.
    page = server.open(f"lab/workspaces/{name}/tree/{name}.ipynb")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    ended = page.locator(".jp-OutputArea-output").filter(has_text=re.compile(r"done in \d+ s"))
    ended.or_(tracebacks(page)).first.wait_for()
    return page


def tracebacks(page: Page) -> Locator:
    kinds = ("error", "stderr")
    return page.locator(", ".join(f'[data-mime-type="application/vnd.jupyter.{kind}"]' for kind in kinds))


def keys(control: Locator) -> tuple[str, str]:
    """A key that moves the control, and the one that moves it back."""
    menu, at = control.evaluate("one => [one.matches('select'), one.selectedIndex ?? +one.value]")
    forth, back = ("ArrowDown", "ArrowUp") if menu else ("ArrowRight", "ArrowLeft")
    return (back, forth) if at else (forth, back)


def wait_for(page: Page, condition: str, *arguments: object) -> None:
    page.wait_for_function(condition, arg=list(arguments), timeout=60_000)


def move_all(page: Page) -> None:
    """Every control by a key and back: what is seen changes, and is what it was."""
    controls = page.locator(".dk :is(input, select)").all()
    assert controls
    for control in controls:
        expect(control).to_have_accessible_name(re.compile(r"\w"))
        assert control.evaluate(TOO_HIGH) <= 0
        element, before = control.element_handle(), control.evaluate(SHOWN)
        forth, back = keys(control)
        control.focus()
        page.keyboard.press(forth)
        wait_for(page, f"([control, before]) => ({SHOWN})(control) != before", element, before)
        page.keyboard.press(back)
        wait_for(page, f"([control, before]) => ({SHOWN})(control) == before", element, before)


def latency(page: Page, control: Locator, presses: int = 24) -> float:
    """Median milliseconds from key to screen, to and fro over the control."""
    control.focus()
    control.evaluate(STOPWATCH)
    forth, back = keys(control)
    for press in range(1, presses + 1):
        page.keyboard.press(forth if (press - 1) % 6 < 3 else back)
        wait_for(page, "([press]) => window.taken.length == press", press)
    return statistics.median(page.evaluate("window.taken"))


@pytest.fixture(scope="module")
def page(server: Any) -> Iterator[Page]:
    """A notebook with one widget of each kind."""
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), server.folder / "widgets.ipynb")
    page = run_all(server, "widgets")
    yield page
    server.close(page)


def test_each_control_of_each_widget_moves_what_is_seen_and_back(page: Page) -> None:
    assert tracebacks(page).all_inner_texts() == []
    move_all(page)
    assert not page.faults


def test_frames_are_swapped_within_60_ms_of_a_slider_that_asks_nobody(page: Page) -> None:
    names = ("in the browser", "step", "size")  # alone, of a film, of the kernel's figures
    alone, *others = (latency(page, page.get_by_role("slider", name=name, exact=True)) for name in names)
    print(f"key to screen: {alone:.0f} ms in the browser alone, {others} ms of a film and of the kernel's figures")
    assert max(others) <= alone + 60


def test_the_latency_test_and_an_error_of_a_view_are_on_the_page(page: Page) -> None:
    expect(page.get_by_text(re.compile(r"to the kernel and back: median \d+ ms, slowest \d+ ms of 20"))).to_be_visible()
    page.get_by_role("slider", name="part").focus()
    page.keyboard.press("End")
    expect(page.get_by_role("alert")).to_contain_text("ZeroDivisionError")


@pytest.mark.long
@pytest.mark.parametrize("name", ALIVE)
def test_a_notebook_runs_and_each_of_its_controls_moves_what_is_seen(server: Any, name: str) -> None:
    page = run_all(server, name)
    expect(tracebacks(page)).to_have_count(0)
    assert page.evaluate(CUT_OFF) == 0
    move_all(page)
    assert not page.faults
    expect(tracebacks(page)).to_have_count(0)
    server.close(page)
