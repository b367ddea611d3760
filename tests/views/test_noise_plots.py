from collections.abc import Iterator
from itertools import product

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from dispersive_kit.data.toy import TOY_SETS
from dispersive_kit.views import noise_plots, style
from dispersive_kit.views.noise_plots import PATHS, TIMES

CORNERS = list(product(TOY_SETS, PATHS, (TIMES[0], TIMES[-1])))


@pytest.fixture(autouse=True)
def clean_figures() -> Iterator[None]:
    plt.switch_backend("Agg")
    style()
    yield
    plt.close("all")


def limits(figure: Figure) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    return [(axis.get_xlim(), axis.get_ylim()) for axis in figure.axes]


@pytest.mark.parametrize(("data", "path", "t"), CORNERS)
def test_a_frame_of_noise_draws_and_keeps_its_axes_at_every_corner(data: str, path: str, t: float) -> None:
    figure = noise_plots.noise_frame(data, path, t)
    figure.canvas.draw()
    assert limits(figure) == limits(noise_plots.noise_frame())


def test_the_first_frame_is_the_data_and_the_last_is_noise_on_every_path() -> None:
    def drawn(data: str, path: str, t: float) -> torch.Tensor:
        line = noise_plots.noise_frame(data, path, t).axes[0].lines[0]
        return torch.stack([torch.as_tensor(line.get_xdata()), torch.as_tensor(line.get_ydata())], 1)

    for path in PATHS:
        assert torch.allclose(drawn("spirals", path, 0.0), drawn("spirals", "linear", 0.0), atol=1e-3)
        assert torch.allclose(drawn("spirals", path, 1.0), drawn("checkerboard", path, 1.0), atol=0.1)


def test_schedules_are_drawn_one_line_a_path() -> None:
    assert [len(axis.lines) for axis in noise_plots.schedule_curves().axes] == [len(PATHS)] * 3


def test_curves_are_the_same_values_twice_and_what_training_sees_is_one_curve_each() -> None:
    times = torch.linspace(0.1, 0.9, 3, dtype=torch.float64)
    figure = noise_plots.against_time_and_snr({"GVP": [0.9, 0.5, 0.2]}, times, "share")
    left, right = (axis.lines[0] for axis in figure.axes)
    assert list(left.get_ydata()) == list(right.get_ydata()) == [0.9, 0.5, 0.2]
    assert torch.allclose(torch.as_tensor(right.get_xdata()), PATHS["GVP"].log_snr(times))
    samples = {"a": torch.linspace(-3, 3, 50), "b": torch.tensor([-40.0, 0.0, 1.0])}
    assert len(noise_plots.snr_histogram(samples).axes[0].lines) == 2
