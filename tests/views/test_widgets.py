"""The glue between sliders and views, without a front end."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from dispersive_kit.views import widgets


@pytest.fixture(autouse=True)
def clean_figures() -> Iterator[None]:
    plt.switch_backend("Agg")
    plt.close("all")  # those of a notebook that was run before in this process
    yield
    assert not plt.get_fignums(), "a widget left a figure open"


class Painter:
    """A view that notes the states it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, size: int, name: str) -> Figure:
        self.asked.append((size, name))
        return plt.figure(figsize=(1, 1))


SLIDERS = {"size": (1, 2, 3), "name": ("a", "b")}


def test_the_explorer_begins_at_the_state_it_is_told() -> None:
    painter = Painter()
    explorer = widgets.explore(painter, SLIDERS, start={"size": 2}, alt="{name} at {size}")
    assert explorer.state == {"size": 2, "name": "a"}
    assert painter.asked == [(2, "a")]
    assert 'alt="a at 2"' in explorer.picture.value


def test_a_slider_changes_the_picture_and_its_alternative_text() -> None:
    explorer = widgets.explore(Painter(), SLIDERS, alt="{name} at {size}")
    explorer.controls["size"].value = 3
    explorer.controls["name"].value = "b"
    assert 'alt="b at 3"' in explorer.picture.value


def test_a_state_seen_before_is_not_drawn_again() -> None:
    painter = Painter()
    explorer = widgets.explore(painter, SLIDERS, alt="")
    for size in (2, 1, 2, 1):
        explorer.controls["size"].value = size
    assert painter.asked == [(1, "a"), (2, "a")]


def test_neighbours_are_drawn_while_the_kernel_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widgets, "IDLE_S", 0.0)
    painter = Painter()

    async def wait() -> None:
        explorer = widgets.explore(painter, SLIDERS, start={"size": 2}, alt="")
        while explorer.neighbours():
            await asyncio.sleep(0.001)

    with ThreadPoolExecutor(1) as own:  # a browser test before may have left its loop running in this thread
        own.submit(asyncio.run, asyncio.wait_for(wait(), 30)).result()
    assert set(painter.asked) == {(2, "a"), (1, "a"), (3, "a"), (2, "b")}
    assert len(painter.asked) == 4


def test_an_error_of_a_view_is_not_swallowed() -> None:
    def fails_at_three(size: int) -> Figure:
        if size == 3:
            raise ValueError("three")
        return plt.figure(figsize=(1, 1))

    explorer = widgets.explore(fails_at_three, {"size": (1, 2, 3)}, alt="")
    with pytest.raises(ValueError, match="three"):
        explorer.controls["size"].value = 3


def test_the_scrubber_swaps_in_the_browser_and_begins_at_the_end() -> None:
    frames = {step: plt.figure(figsize=(1, 1)) for step in (0, 10, 100)}
    box = widgets.scrub(frames, label="step", alt="after {label}")
    slider, stack = box.children
    assert slider.index == stack.selected_index == 2
    assert slider.options == ("0", "10", "100")
    assert ['alt="after 10"' in picture.value for picture in stack.children] == [False, True, False]
    assert box.link.source == (slider, "index")
    assert box.link.target == (stack, "selected_index")


def test_without_a_front_end_the_latency_test_says_so() -> None:
    test = widgets.latency_test()
    assert not test.round_trips
    assert "no front end" in test.text.value


def test_the_latency_test_counts_round_trips_and_leaves_out_the_first() -> None:
    test = widgets.LatencyTest(pings=5)
    test.ping.observe(lambda change: setattr(test.pong, "value", change["new"]), names="value")  # the browser's part
    test.start()
    assert len(test.round_trips) == 6
    assert "of 5" in test.text.value
    assert "immediate" in test.text.value


def test_a_slow_front_end_is_called_slow() -> None:
    test = widgets.LatencyTest()
    test.round_trips = [9.0, 0.2, 0.2, 0.3]
    assert "median 200 ms, slowest 300 ms of 3" in test.verdict()
    assert "lag" in test.verdict()


def test_words_are_on_a_slider_too_since_jupyterlab_takes_the_arrow_keys_from_a_menu() -> None:
    explorer = widgets.explore(Painter(), SLIDERS, start={"size": 2}, alt="")
    assert all(isinstance(one, ipywidgets.SelectionSlider) for one in explorer.controls.values())
