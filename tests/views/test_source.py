"""Library code on a page is the code that runs."""

import inspect
from typing import Any

import pytest

from dispersive_kit.diffusion.objectives import FlowMatching
from dispersive_kit.diffusion.samplers import rk4
from dispersive_kit.views import show_source


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that gives what `show_source` displays."""
    displayed: list[Any] = []
    monkeypatch.setattr("IPython.display.display", displayed.append)

    def of(f: Any) -> Any:
        show_source(f)
        return displayed[-1]

    return of


def test_a_method_is_shown_from_the_margin_and_compiles_as_it_stands(shown: Any) -> None:
    code = shown(FlowMatching.loss).data
    assert code.startswith("def loss(")
    compile("from __future__ import annotations\n" + code, "shown", "exec")


def test_a_sampler_is_shown_as_its_step_in_colour_and_called_with_a_model_and_times(shown: Any) -> None:
    code = shown(rk4)
    assert "def rk4(f: " in code.data and "def run" not in code.data
    assert list(inspect.signature(rk4).parameters)[:3] == ["model", "x", "ts"]
    page = code._repr_html_()
    assert "<span" in page and "://" not in page
