"""Interactive figures: figures with sliders, and films.

Put a widget in the last line of a cell. In the browser, the module `explore.js` shows it. Without a front end it is a
plain figure of its first state.
"""

import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import anywidget
import traitlets
from matplotlib.figure import Figure

from dispersive_kit.views.figures import figure_html

MODULE = Path(__file__).with_name("explore.js")


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


def frames_spec(
    sliders: Mapping[str, Sequence[Any]], start: Sequence[int], frames: Mapping[str, Any], play: str = ""
) -> dict[str, Any]:
    """The spec of frames. Key: indices of the sliders' values. Frame: HTML, or images by title (`rows`) and `alt`."""
    controls = {name: list(values) for name, values in sliders.items()}
    return {"kind": "frames", "controls": controls, "start": start, "frames": frames, "play": play}


def explore(
    view: Callable[..., Figure], sliders: Mapping[str, Sequence[Hashable]], *, alt: str,
    start: Mapping[str, Any] | None = None, caption: str = "", play: str = "",
) -> Explorer:  # fmt: skip
    """`view(**state)` with a slider, or a menu of words, for each name in `sliders`.

    The kernel draws each state once, when the browser needs it. An error of the view is shown in place of the picture.

    alt: alternative text, a format string of the state. start: values to begin with, the first of each otherwise.
    play: the slider whose axis is time, and which can be played.
    """

    @cache
    def draw(*place: int) -> str:
        state = {name: values[i] for (name, values), i in zip(sliders.items(), place, strict=True)}
        return figure_html(view(**state), alt.format(**state), caption)

    def answer(explorer: Explorer, message: Mapping[str, Any], _buffers: Any) -> None:
        place = message["place"]
        try:
            said = {"drawn": draw(*place)}
        except (Exception, KeyboardInterrupt):  # shown whole in the page, in place of the picture
            said = {"fault": traceback.format_exc()}
        explorer.send({"place": place, **said})

    first = [list(values).index((start or {}).get(name, values[0])) for name, values in sliders.items()]
    frames = {",".join(map(str, first)): draw(*first)}
    explorer = Explorer({**frames_spec(sliders, first, frames, play), "asks": True}, draw(*first))
    explorer.on_msg(answer)
    return explorer


def scrub(frames: Mapping[Any, Figure], *, label: str, alt: str, caption: str = "") -> Explorer:
    """The figures of `frames` as a film to play, and to scrub by a slider over their keys; begins at the last.

    alt: alternative text, a format string of `label`. The figures are closed.
    """
    pictures = [figure_html(figure, alt.format(label=key), caption) for key, figure in frames.items()]
    numbered = {str(i): picture for i, picture in enumerate(pictures)}
    return Explorer(frames_spec({label: list(frames)}, (len(pictures) - 1,), numbered, label), pictures[-1])


def latency_test() -> Explorer:
    """Two sliders, one with and one without the kernel, and the time that a message takes to the kernel and back."""
    test = Explorer({"kind": "latency"}, "<p>No front end: there is nothing to measure. This is no error.</p>")
    test.on_msg(lambda widget, message, _buffers: widget.send(message))
    return test
