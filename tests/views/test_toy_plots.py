"""Every figure at the corners of its sliders, and that its axes stay where they are."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from dispersive_kit.data.toy import eight_gaussians
from dispersive_kit.diffusion.paths import LINEAR
from dispersive_kit.views import style, toy_plots
from dispersive_kit.views.plots import figure_html


@pytest.fixture(autouse=True)
def clean_figures() -> Iterator[None]:
    plt.switch_backend("Agg")
    style()
    yield
    plt.close("all")


def points(n: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def limits(figure: Figure) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    return [(axis.get_xlim(), axis.get_ylim()) for axis in figure.axes]


def test_a_larger_cloud_holds_the_smaller_one() -> None:
    assert torch.equal(toy_plots.cloud(64)[:8], toy_plots.cloud(8))


def test_arrows_point_downhill_and_vanish_with_the_gradient() -> None:
    gradient = torch.tensor([[1.0, 0.0], [0.0, -1e-3], [1e-9, 0.0]], dtype=torch.float64)
    drawn = toy_plots.arrows(gradient)
    assert drawn[0, 0] == pytest.approx(-toy_plots.ARROW)
    assert 0 < drawn[1, 1] < toy_plots.ARROW
    assert not drawn[2].any()


def test_field_panels_draw_and_keep_their_axes_at_every_time() -> None:
    data = eight_gaussians()

    def exact(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return LINEAR.convert(data.posterior_mean(x, 1 - t, t), x, t, "x0", "v")

    def zero(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    seen = [limits(toy_plots.field_panels({"exact": exact, "zero": zero}, points(), t)) for t in (0.1, 0.9)]
    assert seen[0] == seen[1]


def test_stage_frames_keep_their_axes_from_the_first_stage_to_the_last() -> None:
    samples, errors = [3 * points(seed=k) for k in range(3)], [(0, 1.1), (10, 0.3), (1000, 0.02)]
    seen = [limits(toy_plots.stage_frame(points(), samples, errors, stage)) for stage in range(3)]
    assert seen[0] == seen[1] == seen[2]


def test_curves_draw_one_line_an_arm() -> None:
    errors, rms = {"a": [(0, 1.0), (9, 0.1)], "b": [(0, 1.0), (9, 0.2)]}, {"a": [1.0, 2.0], "b": [1.0, 20.0]}
    figure = toy_plots.error_curves(errors, rms)
    assert [len(axis.lines) for axis in figure.axes] == [2, 2]
    line = {"step": [0, 1], "loss": [0.0, -1.0], "rms": [1.0, 2e4], "rank": [5.0, 4.0]}
    assert len(toy_plots.descent_panels({"a": line, "b": line}).axes) == 3
    assert len(toy_plots.descent_panels({"a": line}, rank=False).axes) == 2
    figure = toy_plots.gradient_against_scale([0.1, 1.0, 10.0], {"dies": [1e-3, 1e-3, 0.0]})
    assert min(figure.axes[0].lines[0].get_ydata()) == figure.axes[0].get_ylim()[0]  # 0 has no logarithm


def test_nothing_is_drawn_below_the_floor() -> None:
    figure = toy_plots.floor_against_batch([4, 16], {"equal": [0.0, 0.0]})
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["equal", "floor, −log B"]


def test_who_pushes_draws_a_panel_a_temperature() -> None:
    shares = torch.full((50,), 1 / 49)
    assert isinstance(toy_plots.who_pushes(points(), {"small": shares, "large": shares}), Figure)


def test_point_panels_share_their_axes() -> None:
    seen = limits(toy_plots.point_panels({"near": points(), "far": 100 * points()}))
    assert seen[0] == seen[1]


def test_a_figure_carries_its_alternative_text() -> None:
    assert 'alt="two &quot;sets&quot;"' in figure_html(toy_plots.point_panels({"a": points()}), 'two "sets"')
