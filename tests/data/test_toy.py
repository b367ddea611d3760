import pytest
import torch

from dispersive_kit.data import TOY_SETS, sample_toy
from dispersive_kit.data.toy import GaussianMixture, eight_gaussians
from dispersive_kit.errors import DataError


@pytest.mark.parametrize("name", TOY_SETS)
def test_a_seed_gives_the_same_points_and_leaves_the_global_generator_alone(name):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    x, y = sample_toy(name, 500, seed=3)
    again, _ = sample_toy(name, 500, seed=3)
    other, _ = sample_toy(name, 500, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert x.shape == (500, 2) and y.shape == (500,) and torch.equal(x, again) and not torch.equal(x, other)
    assert x.abs().max() < 3 and len(y.unique()) > 1


def test_an_unknown_set_names_those_there_are():
    with pytest.raises(DataError, match="two-moons"):
        sample_toy("three-moons", 5)


def test_posterior_mean_of_a_mixture_is_that_of_importance_sampling():
    mixture = eight_gaussians()
    x0, _ = mixture.sample(400_000, torch.Generator().manual_seed(0))
    x_t, alpha, sigma = torch.tensor([[0.7, 0.2]]), 0.6, 0.5
    weight = torch.softmax(-(x_t - alpha * x0).square().sum(1) / (2 * sigma**2), 0)  # p(x_t | x0)
    expected = (weight[:, None] * x0).sum(0)
    got = mixture.posterior_mean(x_t, torch.tensor(alpha), torch.tensor(sigma))[0]
    assert torch.allclose(got, expected, atol=0.01)


def test_posterior_mean_of_one_gaussian_is_the_wiener_filter():
    mixture = GaussianMixture(torch.tensor([[1.0, -2.0]]), std=0.5)
    x_t = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alpha, sigma = torch.linspace(0.1, 0.9, 4), torch.linspace(0.9, 0.1, 4)
    gain = (alpha * 0.25 / (alpha**2 * 0.25 + sigma**2))[:, None].double()
    expected = mixture.means + gain * (x_t - alpha[:, None] * mixture.means)
    assert torch.allclose(mixture.posterior_mean(x_t, alpha, sigma), expected.double(), atol=1e-6)
