from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dispersive_kit.evaluation import Record, memorisation
from dispersive_kit.views import sample_plots

CELLS = list(product(("base", "paper"), (1, 4), (1.0, 2.5)))
IMAGES = {
    cell: torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
    for i, cell in enumerate(CELLS)
}
DISTANCES = {cell: float(i + 2) for i, cell in enumerate(CELLS)}


@pytest.fixture(autouse=True)
def no_figure_is_left_open():
    yield
    plt.close("all")


def text_of(figure: Figure) -> str:
    return " ".join(t.get_text() for t in figure.findobj(plt.Text))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_sheet_shows_its_cell_and_says_which(cell):
    checkpoint, steps, cfg = cell
    figure = sample_plots.sample_sheet(IMAGES, DISTANCES, checkpoint=checkpoint, steps=steps, cfg=cfg)
    assert f"{checkpoint}, {steps} steps, CFG {cfg:g}: FD {DISTANCES[cell]:.1f}" in text_of(figure)
    shown = np.asarray(figure.axes[3].images[0].get_array())
    np.testing.assert_array_equal(shown, IMAGES[cell][3, 0].numpy())


def test_heatmaps_put_every_distance_in_its_field_on_one_scale():
    figure = sample_plots.settings_heatmaps(DISTANCES, floor=1.5)
    assert [axis.get_title() for axis in figure.axes] == ["base", "paper"]
    first = [t.get_text() for t in figure.axes[0].texts]
    assert first == ["2.0", "3.0", "4.0", "5.0"]  # steps down, scales across
    limits = {axis.collections[0].get_clim() for axis in figure.axes}
    assert limits == {(np.log10(1.5), np.log10(9.0))}


def test_the_panel_has_a_plot_a_metric_and_a_floor_in_each():
    records = [Record(f"{name}[x, N=5]", 4.0, 3.0, 5.0, 2.0, 5, 9) for name in ("FD", "KID", "coverage")]
    figure = sample_plots.panel_figure({"base": records, "paper": records}, columns=2)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title().split()[0] for axis in shown] == ["FD", "KID", "coverage"]
    assert all(any(line.get_xdata()[0] == 2.0 for line in axis.lines) for axis in shown)


def test_the_grid_of_neighbours_begins_with_the_nearest_and_shows_its_neighbour():
    train = torch.randint(256, (30, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = train.flatten(1).double().numpy()
    generated = torch.cat([255 - train[5:15], train[20:21]])
    found = memorisation(generated.flatten(1).double().numpy(), features[::2] + 3, features)
    figure = sample_plots.nearest_train_grid(generated, train, found, columns=4)
    top, below = (np.asarray(figure.axes[i].images[0].get_array()) for i in (0, 4))
    np.testing.assert_array_equal(top, train[20, 0].numpy())
    np.testing.assert_array_equal(below, train[20, 0].numpy())
    ecdf = sample_plots.nearest_train_ecdf({"base": found, "copies": found})
    assert {"base", "copies"} <= set(text_of(ecdf).split())
