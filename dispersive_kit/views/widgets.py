"""Sliders around views, and nothing else: a view is a function of its state that returns a Figure, or SVG text.

    explore(noise_frame, {"path": tuple(PATHS), "t": TIMES}, start={"t": 0.5}, alt="... {path} at t = {t} ...")
    scrub({0: figure, 100: figure}, label="training step", alt="... after {label} steps ...")

A redraw takes longer than a repeated arrow key waits. So `explore` keeps every picture it has drawn and draws the
neighbours of the present state while the kernel is idle; `scrub` draws all before and swaps them in the browser.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from dispersive_kit.views.figures import figure_html

IDLE_S = 0.05  # pause before each neighbour is drawn, in which the next key press is served first
PINGS = 20
WIDE = {"description_width": "initial"}


class Explorer:
    """What `explore` shows: `box` is the widget, `pictures` holds the HTML of every state drawn so far."""

    def __init__(
        self,
        view: Callable[..., Figure | str],
        sliders: Mapping[str, Sequence[Hashable]],
        start: Mapping[str, Any],
        alt: str = "",
        caption: str = "",
    ) -> None:
        self.view, self.alt, self.caption = view, alt, caption
        self.controls = {name: control(name, values, start.get(name)) for name, values in sliders.items()}
        self.pictures: dict[tuple[Any, ...], str] = {}
        self.picture = ipywidgets.HTML(layout={"width": "100%"})
        self._idle: asyncio.TimerHandle | None = None
        self._moved: ipywidgets.Widget | None = None
        for one in self.controls.values():
            one.observe(self.update, names="value")
        self.update()
        rows = ipywidgets.HBox(list(self.controls.values()), layout={"flex_flow": "row wrap"})
        self.box = ipywidgets.VBox([rows, self.picture])

    @property
    def state(self) -> dict[str, Any]:
        return {name: one.value for name, one in self.controls.items()}

    def update(self, change: Any = None) -> None:
        """The callback: show the present state, and later draw what one key press may ask for."""
        if change is not None:
            self._moved = change["owner"]
        self.picture.value = self.draw(self.state)
        if self._idle is not None:
            self._idle.cancel()
        self._later(self.neighbours())

    def draw(self, state: Mapping[str, Any]) -> str:
        key = tuple(state.values())
        if key not in self.pictures:
            self.pictures[key] = self._html(self.view(**state), state)
        return self.pictures[key]

    def _html(self, drawn: Figure | str, state: Mapping[str, Any]) -> str:
        if isinstance(drawn, str):
            return drawn  # SVG, which holds its alternative text
        plt.close(drawn)
        return figure_html(drawn, self.alt.format(**state), self.caption)

    def neighbours(self) -> list[dict[str, Any]]:
        """States one step away in one control that were not drawn yet, those of the control moved last first."""
        controls = sorted(self.controls.items(), key=lambda item: item[1] is not self._moved)
        near = [
            {**self.state, name: one.options[index]}
            for name, one in controls
            for index in (one.index - 1, one.index + 1)
            if 0 <= index < len(one.options)
        ]
        return [state for state in near if tuple(state.values()) not in self.pictures]

    def _later(self, states: list[dict[str, Any]]) -> None:
        """Draw one state after the other, giving way to the kernel between them; without an event loop, none."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if states:
            self._idle = loop.call_later(IDLE_S, self._draw_first, states)

    def _draw_first(self, states: list[dict[str, Any]]) -> None:
        self.draw(states[0])
        self._later(states[1:])


def control(name: str, values: Sequence[Hashable], start: Any = None) -> ipywidgets.SelectionSlider:
    """A slider over values that the arrow keys move; words too, since JupyterLab takes the arrow keys from a menu."""
    words = isinstance(values[0], str)
    value = values[0] if start is None else start
    layout = {"width": "290px" if words else "245px", "margin": "2px 16px 2px 2px"}  # values keep off the next label
    slider = ipywidgets.SelectionSlider(options=list(values), value=value, description=name, style=WIDE, layout=layout)
    return slider.add_class("words") if words else slider


def explore(
    view: Callable[..., Figure],
    sliders: Mapping[str, Sequence[Hashable]],
    *,
    alt: str,
    start: Mapping[str, Any] | None = None,
    caption: str = "",
) -> Explorer:
    """Display `view(**state)` with a slider for each name in `sliders`, and return the explorer.

    alt: alternative text, a format string of the state. start: values to begin with, the first of each otherwise.
    """
    explorer = Explorer(view, sliders, start or {}, alt, caption)
    display_box(explorer.box)
    return explorer


def scrub(frames: Mapping[Any, Figure], *, label: str, alt: str, caption: str = "") -> ipywidgets.VBox:
    """Display one figure of `frames` and a slider over their keys, which swaps them without asking the kernel.

    alt: alternative text, a format string of `label`. Begins at the last frame. The figures are closed.
    """
    pictures = [ipywidgets.HTML(figure_html(f, alt.format(label=key), caption)) for key, f in frames.items()]
    for figure in frames.values():
        plt.close(figure)
    last = len(pictures) - 1
    slider = ipywidgets.SelectionSlider(
        options=[str(key) for key in frames], index=last, description=label, style=WIDE, layout={"width": "500px"}
    )
    stack = ipywidgets.Stack(pictures, selected_index=last)
    box = ipywidgets.VBox([slider, stack])
    box.link = ipywidgets.jslink((slider, "index"), (stack, "selected_index"))
    display_box(box)
    return box


class LatencyTest:
    """How long a number takes from the kernel to the browser and back, and two sliders to feel the difference.

    The kernel sets `ping`; a link inside the browser copies it to `pong`; the kernel sees that. Without a front end
    nobody answers, `round_trips` stays empty, and the text says so.
    """

    def __init__(self, pings: int = PINGS) -> None:
        self.pings = pings
        self.round_trips: list[float] = []  # seconds
        self.ping, self.pong = ipywidgets.IntText(), ipywidgets.IntText()
        self.text = ipywidgets.HTML("no front end has answered: without one, nothing is wrong with that")
        self.link = ipywidgets.jsdlink((self.ping, "value"), (self.pong, "value"))
        self.pong.observe(self._answer, names="value")
        self._sent = time.perf_counter()
        self.box = ipywidgets.VBox(
            [self._pair("in the browser", True), self._pair("through the kernel", False), self.text]
        )

    def start(self) -> None:
        self.round_trips.clear()
        self._send()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self.ping.value += 1

    def _answer(self, _change: Any) -> None:
        self.round_trips.append(time.perf_counter() - self._sent)
        if len(self.round_trips) <= self.pings:
            self._send()
        else:
            self.text.value = self.verdict()

    def verdict(self) -> str:
        """In words; the first round trip waited for the cell to end, and does not count."""
        times = sorted(1000 * one for one in self.round_trips[1:])
        median, slowest = statistics.median(times), times[-1]
        judged = "sliders will feel immediate" if median < 60 else "sliders will lag: is the kernel far away, or busy?"
        return f"kernel to browser and back: median {median:.0f} ms, slowest {slowest:.0f} ms of {len(times)}: {judged}"

    def _pair(self, description: str, in_browser: bool) -> ipywidgets.HBox:
        slider = ipywidgets.IntSlider(description=description, style=WIDE, layout={"width": "420px"})
        bar = ipywidgets.IntProgress(layout={"width": "220px"})
        bar.link = (ipywidgets.jslink if in_browser else ipywidgets.link)((slider, "value"), (bar, "value"))
        return ipywidgets.HBox([slider, bar])


def latency_test() -> LatencyTest:
    """Display the test and start it; the verdict appears once the cell has ended."""
    test = LatencyTest()
    display_box(test.box)
    test.start()
    return test


def display_box(box: ipywidgets.Widget) -> None:
    """Display a widget of this room."""
    from IPython.display import display

    display(box)
