"""Widgets without a front end: what the browser is given, what the kernel draws when it is asked, and the figure."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock, call

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from dispersive_kit.views import widgets

SLIDERS = {"size": (1, 2, 3), "name": ("a", "b")}


@pytest.fixture(autouse=True)
def clean_figures() -> Iterator[None]:
    plt.switch_backend("Agg")
    plt.close("all")  # those of a notebook that was run before in this process
    yield
    assert not plt.get_fignums(), "a widget left a figure open"


def view(size: int, name: str) -> Figure:
    if name == "b" and size == 2:
        raise ValueError("two")
    if name == "b" and size == 1:
        raise KeyboardInterrupt  # as the button of a notebook does it
    return plt.figure(figsize=(1, 1))


def ask(explorer: widgets.Explorer, message: dict[str, Any]) -> dict[str, Any]:
    """What a browser is answered."""
    answers: list[dict[str, Any]] = []
    explorer.send = answers.append
    explorer._handle_custom_msg(message, [])
    return answers[0]


def test_the_first_state_is_there_without_a_front_end_and_a_picture_is_drawn_once() -> None:
    painter = Mock(wraps=view)
    explorer = widgets.explore(painter, SLIDERS, start={"size": 2}, alt="{name} at {size}", caption="small")
    bundle, _ = explorer._repr_mimebundle_()
    assert 'alt="a at 2"' in bundle["text/html"] and "<figcaption>small</figcaption>" in bundle["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert explorer.spec["start"] == [1, 0] and explorer.spec["frames"] == {"1,0": bundle["text/html"]}
    for _ in range(2):
        answer = ask(explorer, {"place": [2, 1]})
        assert answer["place"] == [2, 1] and 'alt="b at 3"' in answer["drawn"]
    assert painter.mock_calls == [call(size=2, name="a"), call(size=3, name="b")]


def test_an_error_of_a_view_stops_the_cell_at_first_and_later_is_told_to_the_browser() -> None:
    with pytest.raises(ValueError, match="two"):
        widgets.explore(view, SLIDERS, start={"size": 2, "name": "b"}, alt="")
    answer = ask(widgets.explore(view, SLIDERS, alt=""), {"place": [1, 1]})
    assert answer["place"] == [1, 1] and answer["fault"].endswith("ValueError: two\n")
    assert "KeyboardInterrupt" in ask(widgets.explore(view, SLIDERS, alt=""), {"place": [0, 1]})["fault"]


def test_a_film_is_given_whole_and_begins_at_its_end() -> None:
    film = widgets.scrub({step: plt.figure(figsize=(1, 1)) for step in (0, 10, 100)}, label="step", alt="after {label}")
    assert film.spec["controls"] == {"step": [0, 10, 100]} and film.spec["play"] == "step"
    assert film.spec["start"] == (2,) and 'alt="after 100"' in film.still
    assert ['alt="after 10"' in film.spec["frames"][key] for key in "012"] == [False, True, False]


def test_the_latency_test_says_what_it_is_without_a_front_end_and_answers_one() -> None:
    test = widgets.latency_test()
    assert "No front end" in test.still and ask(test, {"ping": 3}) == {"ping": 3}
