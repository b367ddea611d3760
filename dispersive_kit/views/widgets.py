"""What moves on a page: figures behind sliders, and films.

    explore(noise_frame, {"path": tuple(PATHS), "t": TIMES}, start={"t": 0.5}, alt="... {path} at t = {t} ...")
    scrub({0: figure, 100: figure}, label="training step", alt="... after {label} steps ...")

Both return a widget for the last line of a cell. All of it is shown in the browser by one module, `explore.js`; without
a front end a widget is a plain figure, that of the state it begins with.
"""

import asyncio
import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import matplotlib.pyplot as plt
import traitlets
from matplotlib.figure import Figure

from dispersive_kit.views.figures import figure_html

MODULE = Path(__file__).with_name("explore.js")
IDLE_S = 0.05  # pause before each neighbour is drawn, in which the next key press is served first
Place = tuple[int, ...]  # index of the value of each slider


class Explorer(anywidget.AnyWidget):
    """A demo in the browser: `spec` says what `explore.js` draws, `still` is the figure (HTML) without a front end."""

    _esm = MODULE
    spec = traitlets.Dict().tag(sync=True)

    def __init__(self, spec: Mapping[str, Any], still: str) -> None:
        super().__init__(spec=dict(spec))
        self.still = still

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        return {**bundle, "text/html": self.still}, metadata


class Drawing(Explorer):
    """Figures that the kernel draws when they are asked for: `pictures` holds those drawn so far, as HTML.

    A redraw takes longer than a repeated arrow key waits. So the neighbours of the state in the browser are drawn while
    the kernel is idle. Without a browser nothing is drawn but the first.
    """

    def __init__(
        self, view: Callable[..., Figure], sliders: Mapping[str, Sequence[Hashable]], start: Mapping[str, Any],
        play: str, alt: str, caption: str,
    ) -> None:  # fmt: skip
        self.view, self.alt, self.caption = view, alt, caption
        self.sliders = {name: list(values) for name, values in sliders.items()}
        self.pictures: dict[Place, str] = {}
        place = tuple(values.index(start.get(name, values[0])) for name, values in self.sliders.items())
        drawn = {",".join(map(str, place)): self.draw(place)}
        super().__init__({**frames_spec(self.sliders, place, drawn, play), "asks": True}, self.draw(place))
        self._idle: asyncio.TimerHandle | None = None
        self.on_msg(self._asked)

    def draw(self, place: Place) -> str:
        if place not in self.pictures:
            state = {name: values[i] for (name, values), i in zip(self.sliders.items(), place, strict=True)}
            self.pictures[place] = still(self.view(**state), self.alt.format(**state), self.caption)
        return self.pictures[place]

    def neighbours(self, place: Place) -> list[Place]:
        """Places one step away in one slider that were not drawn yet."""
        near = [
            (*place[:k], i, *place[k + 1 :])
            for k, values in enumerate(self.sliders.values())
            for i in (place[k] - 1, place[k] + 1)
            if 0 <= i < len(values)
        ]
        return [one for one in near if one not in self.pictures]

    def _asked(self, _widget: Any, message: Mapping[str, Any], _buffers: Any) -> None:
        place = tuple(message["place"])
        self._answer(place, message["known"])
        if self._idle is not None:
            self._idle.cancel()
        self._later(self.neighbours(place))

    def _answer(self, place: Place, known: bool = False) -> None:
        """Send the picture of a place, or the error of the view, which is then seen where the picture would be."""
        try:
            said = {"html": self.draw(place)}
        except Exception:
            said = {"fault": traceback.format_exc()}
        self.send({"place": place} | ({} if known else said))

    def _later(self, places: list[Place]) -> None:
        """Draw one after the other, giving way to the kernel between them; without an event loop, none."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if places:
            self._idle = loop.call_later(IDLE_S, self._draw_first, places)

    def _draw_first(self, places: list[Place]) -> None:
        self._answer(places[0])
        self._later(places[1:])


def frames_spec(
    sliders: Mapping[str, Sequence[Any]], start: Place, frames: Mapping[str, Any], play: str = ""
) -> dict[str, Any]:
    """Of frames by the indices of the sliders' values: HTML, or images by their titles (`rows`) and an `alt`."""
    return {"kind": "frames", "controls": dict(sliders), "start": start, "frames": frames, "play": play}


def explore(
    view: Callable[..., Figure], sliders: Mapping[str, Sequence[Hashable]], *, alt: str,
    start: Mapping[str, Any] | None = None, caption: str = "", play: str = "",
) -> Explorer:  # fmt: skip
    """`view(**state)` with a slider, or a menu of words, for each name in `sliders`.

    Args:
        alt: alternative text, a format string of the state.
        start: values to begin with, the first of each otherwise.
        play: the slider whose axis is time, and which can be played.
    """
    return Drawing(view, sliders, start or {}, play, alt, caption)


def scrub(frames: Mapping[Any, Figure], *, label: str, alt: str, caption: str = "") -> Explorer:
    """The figures of `frames` as a film to play, and to scrub by a slider over their keys; begins at the last.

    alt: alternative text, a format string of `label`. The figures are closed.
    """
    pictures = [still(figure, alt.format(label=key), caption) for key, figure in frames.items()]
    numbered = {str(i): picture for i, picture in enumerate(pictures)}
    return Explorer(frames_spec({label: list(frames)}, (len(pictures) - 1,), numbered, label), pictures[-1])


def still(figure: Figure, alt: str, caption: str = "") -> str:
    """The figure as HTML, and closed."""
    plt.close(figure)
    return figure_html(figure, alt, caption)


def latency_test() -> Explorer:
    """Two sliders, one of which asks the kernel, and how long a number takes to the kernel and back."""
    test = Explorer({"kind": "latency"}, "<p>No front end: nothing to measure, and nothing is wrong with that.</p>")
    test.on_msg(lambda widget, message, _buffers: widget.send(message))
    return test
