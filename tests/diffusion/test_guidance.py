"""Guidance: what is evaluated, where, and on which channels."""

import pytest
import torch

from dispersive_kit.diffusion.guidance import ClassifierFree
from dispersive_kit.diffusion.samplers import dopri5, euler, heun, initial_noise, time_grid
from dispersive_kit.errors import ConfigError

NULL = 3


class Counting:
    """out = (y + 1) x in each channel; counts calls and rows."""

    def __init__(self):
        self.calls = self.rows = 0

    def __call__(self, x, t, y):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return (y + 1).reshape(-1, *[1] * (x.ndim - 1)) * x


@pytest.fixture
def x():
    return initial_noise([0, 1], (4, 2, 2))


Y = torch.tensor([0, 2])


def test_guided_is_null_plus_scale_times_the_difference_on_every_channel_but_a_learned_variance(x):
    model, y = Counting(), Y.reshape(-1, 1, 1, 1)
    out = ClassifierFree(Y, NULL, scale=2.5)(model, x, 0.5)
    torch.testing.assert_close(out, (4 + 2.5 * (y + 1 - 4)) * x)
    assert (model.calls, model.rows) == (1, 4)
    learned = lambda x, t, y: torch.cat([x, (y + 1).reshape(-1, 1, 1, 1) * torch.ones_like(x)], 1)  # noqa: E731
    out = ClassifierFree(Y, NULL, scale=2.5)(learned, x, 0.5)
    torch.testing.assert_close(out[:, 4:], (y + 1) * torch.ones_like(x))


@pytest.mark.parametrize("guidance,rows", [
    (ClassifierFree(Y, NULL, scale=1.0), 2 * 10),
    (ClassifierFree(Y, NULL, scale=2.0), 4 * 10),
    (ClassifierFree(Y, NULL, scale=2.0, low=0.25, high=0.65), 2 * 10 + 2 * 4),
])  # fmt: skip
def test_rows_evaluated_in_ten_euler_steps(x, guidance, rows):
    model = Counting()
    euler(model, x, time_grid(10), guidance=guidance)
    assert (model.calls, model.rows) == (10, rows)


def test_times_of_their_own_are_guided_sample_by_sample(x):
    guidance = ClassifierFree(Y, NULL, scale=2.0, low=0.3, high=0.6)
    out = guidance(Counting(), x, torch.tensor([0.5, 0.9]))
    torch.testing.assert_close(out[0], guidance(Counting(), x, 0.5)[0])
    torch.testing.assert_close(out[1], guidance(Counting(), x, 0.9)[1])


def test_an_interval_changes_the_adaptive_and_the_fixed_sampler_alike(x):
    guidance = ClassifierFree(Y, NULL, scale=1.3, low=0.25, high=0.75)
    ts = time_grid(400)
    fixed = heun(Counting(), x.double(), ts, guidance=guidance)
    adaptive = dopri5(Counting(), x.double(), [1, 0], guidance=guidance, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(adaptive, fixed, atol=1e-3, rtol=1e-2)


def test_guidance_that_lacks_its_other_half_or_its_interval_is_refused(x):
    for guidance in (ClassifierFree(Y, None, scale=2.0), ClassifierFree(None, NULL, scale=2.0)):
        with pytest.raises(ConfigError, match="needs y and a null class"):
            guidance(Counting(), x, 0.5)
    assert ClassifierFree(Y, None)(Counting(), x, 0.5).shape == x.shape  # scale 1 needs no null class
    for low, high in ((0.9, 0.1), (-0.1, 1.0), (0.0, 1.5)):
        with pytest.raises(ConfigError, match="0 <= low <= high <= 1"):
            ClassifierFree(Y, NULL, scale=3.0, low=low, high=high)


@pytest.mark.parametrize("steps", [10, 20, 25, 50])
def test_the_ends_of_the_interval_belong_to_it_whatever_their_last_bit(x, steps):
    for k in range(1, steps):
        end = (steps - k) / steps
        for interval, guided in (({"high": end}, steps - k), ({"low": end}, k + 1)):
            model = Counting()
            euler(model, x, time_grid(steps), guidance=ClassifierFree(Y, NULL, scale=2.0, **interval))
            assert model.rows == 2 * steps + 2 * min(guided, steps), (end, interval)
