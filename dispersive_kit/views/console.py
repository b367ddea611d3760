"""The lecture console: every demo in large type, with widgets for Voila and JupyterLab, or as one HTML file.

console = open_console()          # in a notebook
write_console(Path("console.html"))  # offline: the same pictures inside, no address outside
"""

import importlib.resources
import itertools
import json
from pathlib import Path
from typing import Any

import ipywidgets
from matplotlib import colormaps
from matplotlib.colors import to_hex
from torch import Tensor

from dispersive_kit.views.demos import ARMS, DEMOS, Demo, agreement, quiz_samples
from dispersive_kit.views.playground import Playground, for_the_browser
from dispersive_kit.views.quiz import EACH, Quiz, quiz_frame
from dispersive_kit.views.widgets import Explorer, display_box

QUESTION = "Six digits from each network, from the same noises. Which look better to you?"
LARGE_TYPE = """<style>
.lecture {width: 100%; overflow: hidden}
.lecture button, .lecture .widget-readout, .lecture .widget-label, .lecture .widget-html-content {
  font-size: 20px !important; line-height: 1.3}
.lecture h2 {margin: 4px 0 0; font-size: 26px} .lecture p {margin: 0 0 4px; font-size: 20px}
.lecture .widget-hslider, .lecture button {height: 38px !important}
.lecture .widget-hslider {width: auto !important} .lecture .words {width: 390px !important}
.lecture .slider-container {flex: 1 0 112px !important; min-width: 112px}
.lecture .widget-toggle-buttons {width: 100%} .lecture .widget-toggle-buttons button {padding: 0 8px}
.lecture .widget-readout {min-width: 76px !important; max-width: none !important; overflow: visible !important;
  margin-left: 20px !important}
.lecture .widget-hslider .widget-label {margin-right: 22px}
.lecture .noUi-handle {width: 22px !important; height: 22px !important; top: -10px !important; right: -11px !important}
.lecture .noUi-connects, .lecture .noUi-target {background: #6e6e6e}
.lecture svg {max-height: calc(100vh - 230px); min-height: 240px}
.lecture .mod-active, .lecture .noUi-handle {background: #0072b2 !important; color: #fff !important}
.lecture :focus-visible {outline: 3px solid #d55e00 !important}
</style>"""


class Console:
    """`box` is the widget: buttons, of which each opens a demo. `explorers` by name, `playground`, `quiz`."""

    def __init__(self, seed: int = 0) -> None:
        self.playground = Playground(B=16, s=1.0, tau=0.5)
        self.explorers = {name: _explorer(demo) for name, demo in DEMOS.items()}
        self.quiz = Quiz(quiz_samples(), question=QUESTION, seed=seed)
        pages = [self._page("Playground", "Choose a point and move it. What brings dead arrows back?", self.playground)]
        pages += [self._page(demo.title, demo.hint, self.explorers[name]) for name, demo in DEMOS.items()]
        pages.append(self._page("Blind test", "", self.quiz))
        titles = ["Playground", *(demo.title.split(",")[0] for demo in DEMOS.values()), "Blind test"]
        self.tabs = ipywidgets.ToggleButtons(options=titles, style={"button_width": "auto"})
        self.stack = ipywidgets.Stack(pages, selected_index=0, layout={"width": "100%"})
        self.link = ipywidgets.jslink((self.tabs, "index"), (self.stack, "selected_index"))
        self.box = ipywidgets.VBox([ipywidgets.HTML(LARGE_TYPE), self.tabs, self.stack])
        self.box.add_class("lecture")

    @staticmethod
    def _page(title: str, hint: str, inside: Any) -> ipywidgets.VBox:
        inside.box.layout.width = "100%"
        return ipywidgets.VBox(
            [ipywidgets.HTML(f"<h2>{title}</h2><p>{hint}</p>"), inside.box], layout={"width": "100%"}
        )


def cell_look(values: Tensor) -> list[list[tuple[str, str, str]]]:
    """Words, colour and colour of the words of each cell of a map (rows, columns) of shares."""

    def look(share: float) -> tuple[str, str, str]:
        return f"{share:.0%}", to_hex(colormaps["cividis"](share)), "#000" if share > 0.5 else "#fff"

    return [[look(share) for share in row] for row in values.tolist()]


def add_cells(explorer: Explorer, names: tuple[str, str]) -> None:
    """Put a button for each cell of the map in place of the controls it sets: the one across, the one down."""
    across, down = (explorer.controls[name] for name in names)
    grid = ipywidgets.GridspecLayout(len(down.options), len(across.options) + 1, width="420px", grid_gap="2px")
    for row, name in enumerate(down.options):
        grid[row, 0] = ipywidgets.Label(str(name))
        for column in range(len(across.options)):
            grid[row, column + 1] = ipywidgets.Button(layout={"width": "auto"})
            grid[row, column + 1].on_click(lambda _, place=(row, column): go(*place))

    def go(row: int, column: int) -> None:
        across.index, down.index = column, row

    def paint(_change: Any = None) -> None:
        looks = cell_look(agreement(explorer.state["arm"]))
        for row, column in itertools.product(range(len(down.options)), range(len(across.options))):
            button, here = grid[row, column + 1], (row, column) == (down.index, across.index)
            words, button.style.button_color, button.style.text_color = looks[row][column]
            button.description = f"[{words}]" if here else words

    for one in explorer.controls.values():
        one.observe(paint, names="value")
    paint()
    free = [one for one in explorer.controls.values() if one not in (across, down)]
    words = ipywidgets.Label(f"{names[1]} down, {names[0]} across")
    beside = ipywidgets.VBox([*free, words, grid], layout={"flex": "0 0 auto", "margin": "0 20px 0 0"})
    explorer.box.children = [ipywidgets.HBox([beside, explorer.picture], layout={"width": "100%"})]


def open_console(seed: int = 0) -> Console:
    """Display the console, and return it. seed: of the sides in the blind test."""
    console = Console(seed)
    display_box(console.box)
    return console


def open_demo(name: str) -> Explorer:
    """Display one of `DEMOS` in a notebook, and return it."""
    explorer = _explorer(DEMOS[name])
    display_box(explorer.box)
    return explorer


def _explorer(demo: Demo) -> Explorer:
    explorer = Explorer(demo.view, demo.controls, demo.start)
    if demo.cells:
        add_cells(explorer, demo.cells)
    return explorer


def frames_of(name: str) -> dict[str, Any]:
    """A demo with the picture of every state, for the page: frames by the indices of the controls' values."""
    demo = DEMOS[name]
    options = [range(len(values)) for values in demo.controls.values()]
    frames = {}
    for place in itertools.product(*options):
        state = {key: values[i] for (key, values), i in zip(demo.controls.items(), place, strict=True)}
        frames[",".join(map(str, place))] = demo.view(**state)
    start = {key: values.index(demo.start.get(key, values[0])) for key, values in demo.controls.items()}
    page = {"id": name, "title": demo.title, "hint": demo.hint, "controls": demo.controls, "start": start}
    cells = {"names": demo.cells, "values": [cell_look(agreement(arm)) for arm in ARMS]} if demo.cells else None
    return {**page, "frames": frames, "cells": cells}


def quiz_rounds() -> dict[str, Any]:
    """Each round twice: the first arm on the left, and on the right."""
    first, second = quiz_samples().values()
    parts = [slice(k, k + EACH) for k in range(0, len(first), EACH)]
    rounds = [[quiz_frame(first[one], second[one]), quiz_frame(second[one], first[one])] for one in parts]
    return {"question": QUESTION, "arms": list(quiz_samples()), "rounds": rounds}


def console_html() -> str:
    """The whole console as one page that fetches nothing."""
    data = {"playground": for_the_browser(), "demos": [frames_of(name) for name in DEMOS], "quiz": quiz_rounds()}
    page = (importlib.resources.files("dispersive_kit") / "views" / "console.html").read_text()
    return page.replace("{{ data }}", json.dumps(data, ensure_ascii=False, allow_nan=False).replace("</", "<\\/"))


def write_console(file: Path) -> int:
    """Write the page, and say how many bytes it has."""
    file.write_text(console_html(), encoding="utf-8")
    return file.stat().st_size
