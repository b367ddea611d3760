"""Figures of the analysis: drawn over the corners of their state, on axes that do not move."""

import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dispersive_kit.analysis import Pull
from dispersive_kit.analysis.umap_grid import ARMS, name_of
from dispersive_kit.views import analysis_plots as views
from dispersive_kit.views.plots import STYLE

LEVELS = (math.inf, 2.0, -2.0)
LABELS = torch.arange(30) % 3


@pytest.fixture(autouse=True)
def no_figure_is_left_open():
    yield
    plt.close("all")


def swept(scale: float) -> SimpleNamespace:
    """As much of a Sweep as is drawn."""
    value = scale * torch.arange(1.0, 7).reshape(3, 2).double()
    return SimpleNamespace(levels=LEVELS, values={"rankme": value, "feature_rms": value}, gaussian={"rankme": value})


def test_every_figure_is_drawn():
    g = torch.Generator().manual_seed(0)
    maps = {"base": torch.rand(3, 2, generator=g), "loss": torch.rand(3, 2, generator=g)}
    points = {"a": np.random.default_rng(0).normal(size=(30, 2)), "b": np.zeros((30, 2))}
    pull = Pull(torch.rand(4, 2, generator=g), torch.zeros(4, 2), torch.zeros(2))
    result = SimpleNamespace(accuracy=0.5, low=0.4, high=0.7)
    grid = {name_of(arm, 5, 0.1, 0): points["a"] for arm in ARMS}
    curve = torch.arange(20, 0, -1).double()
    for figure in (
        views.block_maps(maps, LEVELS, "x"),
        views.block_maps({"base": 1 + maps["base"]}, LEVELS, "x", log=True),
        views.spectra({"base": curve}, {"base": curve + 1}, title="t"),
        views.similarity_matrices({"base": torch.randn(30, 4, generator=g)}, LABELS),
        views.cka_maps({"base": torch.eye(2), "base | loss": torch.rand(2, 3, generator=g)}),
        views.pull_panels({"base": pull, "loss": pull}),
        views.token_grid(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), {"t": np.zeros((3, 4, 4, 3))}),
        views.token_grid(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), {"t": np.zeros((3, 4, 4, 3))}),
        views.embeddings(points, LABELS, {"a": 0.9, "b": 0.5}),
        views.probe_maps({"ridge": maps}, LEVELS, "ridge"),
        views.umap_pair(grid, dict.fromkeys(grid, 0.9), LABELS, neighbours=5, min_dist=0.1, seed=0),
        views.intervals({"base": result, "pixels": result}, chance=0.1),
        views.stage_panel({100: points["a"], 200: points["b"]}, 200, LABELS, 0.9),
    ):
        assert isinstance(figure, Figure)
        figure.canvas.draw()


@pytest.mark.parametrize("measure", ["rankme", "feature_rms"])  # with a Gaussian null, and without
def test_a_slider_over_the_block_moves_the_curves_and_not_the_axes(measure):
    figures = [views.measure_curves({"base": swept(1), "loss": swept(2)}, swept(3), measure, b) for b in (1, 2)]
    first, second = (figure.axes[0] for figure in figures)
    assert first.get_ylim() == second.get_ylim() and first.get_position().bounds == second.get_position().bounds
    assert not np.allclose(first.lines[0].get_ydata(), second.lines[0].get_ydata())
    assert len(first.lines) == (5 if measure == "rankme" else 3)


def test_arms_share_one_scale_of_colours_and_the_difference_is_centred():
    figure = views.block_maps({"base": torch.zeros(3, 2), "loss": torch.ones(3, 2)}, LEVELS, "x")
    base, loss, apart = (axis.collections[0].get_clim() for axis in figure.axes)
    assert base == loss == (0, 1) and apart == (-1, 1)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "clean"


def test_the_legend_of_the_two_gradients_lies_on_no_panel():
    """Their lines may be anywhere in them."""
    pull = Pull(torch.rand(4, 2), torch.zeros(4, 2), torch.zeros(2))
    with plt.rc_context(STYLE):
        figure = views.pull_panels({"base": pull, "loss": pull})
        figure.canvas.draw()
    (legend,) = figure.legends
    assert len(legend.texts) == 4
    assert not any(axis.get_legend() or legend.get_window_extent().overlaps(axis.bbox) for axis in figure.axes)


def test_similarities_are_sorted_by_class():
    x = torch.eye(3)[LABELS] + 1e-3 * torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    image = views.similarity_matrices({"x": x}, LABELS).axes[0].images[0].get_array()
    assert image[:10, :10].min() > 0.99 and image[:10, 10:].max() < 0


def test_stages_of_training_are_drawn_on_the_axes_of_all():
    stages = {1: np.zeros((30, 2)), 2: np.full((30, 2), 9.0)}
    one, two = (views.stage_panel(stages, step, LABELS, 0.9).axes[0] for step in stages)
    assert one.get_xlim() == two.get_xlim() == (-0.5, 9.5)
