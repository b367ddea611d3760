import math

import numpy as np
import pytest
import torch
from torch import nn

from dispersive_kit.errors import CheckpointError, ConfigError
from dispersive_kit.training.checkpoint import Checkpoint, save_checkpoint
from dispersive_kit.training.ema import EMA, PowerEMA, power_exponent, profile_product, reconstruct


def test_the_average_is_the_recursion_written_out():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    ema = EMA(model, decay=0.9)
    expected = model.weight.detach().clone()
    for n in range(30):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, dtype=torch.float64))
        ema.update(model)
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * model.weight.detach()
    assert torch.allclose(ema.model.weight, expected, atol=1e-12)
    assert not ema.model.weight.requires_grad and not ema.model.training


def test_buffers_are_copied_not_averaged():
    model = nn.BatchNorm1d(2)
    ema = EMA(model)
    model.train()(torch.randn(8, 2) + 5)
    ema.update(model)
    assert torch.equal(ema.model.running_mean, model.running_mean)


# ---- averages of a relative width, and any width after the fact (arXiv 2312.02696)


class Line(nn.Module):
    """One weight that is the step number, so an average is the mean of its profile."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def walk(averages, steps, every=0, folder=None, seed=None):
    """Update the averages along weights 1, 2, ..., or along a random walk; snapshots go to the folder."""
    model, generator = Line(), torch.Generator().manual_seed(seed or 0)
    for t in range(1, steps + 1):
        with torch.no_grad():
            jump = torch.randn(1, generator=generator, dtype=torch.float64) if seed else torch.ones(1)
            model.weight += jump
        for average in averages.values():
            average.update(model)
        if every and t % every == 0:
            groups = {name: average.model.state_dict() for name, average in averages.items()}
            save_checkpoint(folder, Checkpoint(t, groups, {}), keep_last=None)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_a_power_average_has_the_width_that_was_asked_for(width):
    gamma = power_exponent(width)
    # moments of t^gamma on [0, 1]
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(width, rel=1e-9)
    averages = {"one": PowerEMA(Line(), width)}
    walk(averages, 4000)
    assert float(averages["one"].model.weight) / 4000 == pytest.approx(mean, rel=2e-3)


def test_a_power_average_forgets_its_initialisation():
    model, average = Line(), PowerEMA(Line(), 0.1)
    with torch.no_grad():
        average.model.weight.fill_(1e6)
        model.weight.fill_(3.0)
    average.update(model)
    assert float(average.model.weight) == 3.0


@pytest.mark.parametrize("width", [0, -1, 0.3, 12**-0.5])
def test_an_impossible_width_is_refused(width):
    with pytest.raises(ConfigError, match="width"):
        power_exponent(width)


def test_profiles_multiply_as_their_integrals_do():
    t = np.linspace(0, 200, 400_001)

    def profile(length, gamma):
        return np.where(t <= length, (gamma + 1) * t**gamma / length ** (gamma + 1), 0)

    for a, b in [((100, 6.9), (200, 16.9)), ((200, 6.9), (100, 16.9)), ((150, 3.0), (150, 3.0))]:
        integral = np.trapezoid(profile(*a) * profile(*b), t)
        ours = profile_product(*(np.array(float(v)) for v in (*a, *b)))
        assert float(ours) == pytest.approx(integral, rel=1e-4)


def test_a_tracked_width_is_reconstructed_exactly(tmp_path):
    averages = {"0.05": PowerEMA(Line(), 0.05), "0.1": PowerEMA(Line(), 0.1)}
    walk(averages, 400, every=50, folder=tmp_path, seed=3)
    for name, average in averages.items():
        got = reconstruct(tmp_path, float(name))["weight"]
        assert float(got) == pytest.approx(float(average.model.weight), rel=1e-6)


@pytest.mark.parametrize("width", [0.06, 0.08, 0.12, 0.15])
def test_another_width_is_reconstructed_near_the_one_that_was_tracked_live(tmp_path, width):
    tracked = {"0.05": PowerEMA(Line(), 0.05), "0.1": PowerEMA(Line(), 0.1)}
    live = {"live": PowerEMA(Line(), width)}
    walk(tracked, 1000, every=50, folder=tmp_path, seed=5)
    walk(live, 1000, seed=5)
    truth, got = float(live["live"].model.weight), float(reconstruct(tmp_path, width)["weight"])
    spread = abs(float(tracked["0.05"].model.weight) - float(tracked["0.1"].model.weight))
    assert abs(got - truth) < 0.05 * spread


def test_a_run_without_snapshots_says_how_to_get_them(tmp_path):
    with pytest.raises(CheckpointError, match="ema_widths"):
        reconstruct(tmp_path, 0.1)
