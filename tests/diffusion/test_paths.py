"""Paths: their derivatives, conversions and posterior, and the discrete schedules of diffusers."""

import pytest
import torch

from dispersive_kit.diffusion.paths import PREDICTIONS, DDPMPath, LinearPath, VPPath
from dispersive_kit.errors import ConfigError


def triple(generator, n=64):
    t = 0.02 + 0.96 * torch.rand(n, generator=generator, dtype=torch.float64)
    return t, *torch.randn(2, n, 3, generator=generator, dtype=torch.float64)


def test_velocity_is_the_time_derivative_of_x_t(path, generator):
    t, x0, eps = triple(generator)
    h = 1e-7  # within one timestep of the discrete schedules, which are smooth between timesteps only
    t = (t * 1000).floor() / 1000 + 0.0005
    slope = (path.x_t(x0, eps, t + h) - path.x_t(x0, eps, t - h)) / (2 * h)
    torch.testing.assert_close(path.velocity(x0, eps, t), slope, atol=1e-6, rtol=1e-6)


def test_t_0_is_data_and_t_1_is_noise(path):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(path.alpha(ends), torch.tensor([1.0, 0.0]).double(), atol=7e-3, rtol=0)
    torch.testing.assert_close(path.sigma(ends), torch.tensor([0.0, 1.0]).double(), atol=1e-4, rtol=0)
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    assert (path.log_snr(t).diff() < 0).all()


@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("to", PREDICTIONS)
def test_every_prediction_converts_to_every_other(path, generator, source, to):
    t, x0, eps = triple(generator)
    x = path.x_t(x0, eps, t)
    truth = {"x0": x0, "eps": eps, "v": path.velocity(x0, eps, t), "score": -eps / path.sigma(t)[:, None]}
    torch.testing.assert_close(path.convert(truth[source], x, t, source, to), truth[to], atol=1e-8, rtol=1e-8)


def test_posterior_composes_to_the_marginal(path):
    """Drawing x_t and then x_s from the posterior has the mean and variance of drawing x_s at once."""
    t, s = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.31, dtype=torch.float64)
    a, b, variance, step_variance = path.posterior(t, s)
    torch.testing.assert_close(a * path.alpha(t) + b, path.alpha(s))
    torch.testing.assert_close(a**2 * path.sigma(t) ** 2 + variance, path.sigma(s) ** 2)
    ratio = path.alpha(t) / path.alpha(s)
    torch.testing.assert_close(ratio**2 * path.sigma(s) ** 2 + step_variance, path.sigma(t) ** 2)


@pytest.mark.parametrize("schedule,theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_discrete_schedule_equals_diffusers(schedule, theirs):
    from diffusers import DDPMScheduler

    expected = DDPMScheduler(1000, beta_schedule=theirs).alphas_cumprod.double()
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(DDPMPath(schedule).alpha(t) ** 2, expected, atol=1e-6, rtol=1e-4)
    in_float32 = DDPMPath(schedule).sigma(t.float())
    torch.testing.assert_close(in_float32.double() ** 2, 1 - expected, atol=1e-6, rtol=1e-4)


def test_vp_is_the_limit_of_the_discrete_linear_schedule():
    t = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    torch.testing.assert_close(DDPMPath().alpha(t), VPPath().alpha(t), atol=1e-3, rtol=2e-2)


def test_unknown_names_are_refused():
    x, t = torch.zeros(1, 2), torch.ones(1)
    for call, words in (
        (lambda: LinearPath().convert(x, x, t, "noise", "x0"), "'noise' is unknown: it is one of x0, eps, v, score"),
        (lambda: LinearPath().convert(x, x, t, "x0", "noise"), "'noise' is unknown: it is one of x0, eps, v, score"),
        (lambda: DDPMPath("sigmoid"), "'linear' or 'cosine'"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()
