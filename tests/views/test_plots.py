import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dispersive_kit.evaluation import Record
from dispersive_kit.views import plots


@pytest.fixture(autouse=True)
def no_figure_is_left_open():
    yield
    plt.close("all")


def lines(gap, rms):
    return [{"step": s, "gap": gap / s, "feature_rms": rms, "gradient_ratio": 0.1 / s} for s in (1, 10, 20)]


METRICS = {"base": lines(3.0, 1.0), "paper": [*lines(0.0, 9.0), {"step": 25, "held_out": 0.5}]}
IMAGES = {
    "base": torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8),
    "paper": torch.zeros(10, 3, 8, 8, dtype=torch.uint8),
}
RECORDS = {
    "base": Record("FD[x, N=5]", 4.0, 3.0, 5.0, 2.0, 5, 9),
    "paper": Record("FD[x, N=5]", 40.0, 41.0, 50.0, 2.0, 5, 9),  # an interval that misses its value
}


def test_every_figure_is_drawn():
    features = {"base": torch.randn(16, 4, 6), "paper": 9 * torch.randn(16, 4, 6)}
    for figure in (
        plots.saturation_panel(METRICS),
        plots.same_noise_grid(IMAGES),
        plots.pairwise_histogram(features),
        plots.distance_panel(list(RECORDS.values()), list(RECORDS)),
        plots.summary(IMAGES, RECORDS, METRICS),
    ):
        assert isinstance(figure, Figure)
        figure.canvas.draw()


def test_a_figure_on_the_page_carries_its_alternative_text_inside():
    figure = plots.saturation_panel(METRICS)
    page = plots.figure_html(figure, alt='two "lines" <cross>', caption="a & b")
    assert re.search(r'<img [^>]*alt="two &quot;lines&quot; &lt;cross&gt;"', page)
    assert page.startswith("<figure") and "a &amp; b" in page and "data:image/png;base64," in page


def test_pairwise_distances_are_the_definition():
    z = torch.randn(5, 2, 3, dtype=torch.float64)
    i, j = np.triu_indices(5, 1)
    expected = ((z[i] - z[j]) ** 2).flatten(1).mean(1)
    assert np.allclose(plots.pairwise_distances(z), expected)


def test_only_size_moves_the_raw_distances_and_not_the_scaled_ones():
    z = torch.randn(20, 8)
    figure = plots.pairwise_histogram({"z": z, "8 z": 8 * z})
    raw, scaled = figure.axes[1].lines, figure.axes[3].lines
    assert not np.allclose(raw[0].get_xdata()[1:], raw[1].get_xdata()[1:])
    assert np.allclose(scaled[0].get_xdata()[1:], scaled[1].get_xdata()[1:])
