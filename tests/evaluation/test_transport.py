"""Wasserstein distances against POT, SciPy and closed forms."""

import numpy as np
import ot
import pytest
from scipy.stats import wasserstein_distance

from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation import exact_w2
from dispersive_kit.evaluation.distances import half_samples
from dispersive_kit.evaluation.transport import sliced_w2


def cloud(n=60, d=5, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


def sliced(x, y, **options):
    return sliced_w2(x, y, np.zeros((0, len(x)), dtype=bool), **options)[0]


@pytest.mark.parametrize("m", [60, 47], ids=["as many", "fewer"])
def test_sliced_w2_equals_pot(m):
    x, y = cloud(), cloud(m, seed=1, shift=0.5)
    directions = np.random.default_rng(0).normal(size=(5, 256))
    directions /= np.linalg.norm(directions, axis=0)
    expected = ot.sliced_wasserstein_distance(x, y, projections=directions, p=2)
    assert sliced(x, y) == pytest.approx(expected, rel=1e-9)


def test_sliced_w2_of_a_shift_is_the_mean_square_along_directions():
    shift = np.array([3.0, 0, 0, 0, 0])
    # E <shift, u>^2 = |shift|^2 / D over the sphere
    assert sliced(cloud(), cloud() + shift, projections=20000) == pytest.approx(3 / np.sqrt(5), rel=0.02)
    assert sliced(cloud(), cloud()) == 0


def test_sliced_w2_on_halves_is_that_of_the_halves():
    x, y, halves = cloud(), cloud(47, seed=1), half_samples(60, 4)
    np.testing.assert_allclose(sliced_w2(x, y, halves)[1], [sliced(x[half], y) for half in halves])


@pytest.mark.parametrize(("n", "m"), [(7, 7), (6, 9), (10, 2)])
def test_on_a_line_unequal_sets_are_compared_by_their_quantiles(n, m):
    x, y = cloud(n, 1), cloud(m, 1, seed=1)
    assert sliced(x, y) == pytest.approx(ot.wasserstein_1d(x, y, p=2)[0] ** 0.5)


def test_exact_w2_equals_pot():
    x, y = cloud(200, 2), cloud(200, 2, seed=1, shift=1.0)
    weights = np.full(200, 1 / 200)
    assert exact_w2(x, y) == pytest.approx(np.sqrt(ot.emd2(weights, weights, ot.dist(x, y))), rel=1e-9)


def test_exact_w2_of_a_shift_is_its_length_and_on_a_line_that_of_sorted_points():
    x = cloud(80, 2)
    assert exact_w2(x, x + np.array([3.0, 4.0])) == pytest.approx(5)
    a, b = cloud(50, 1), cloud(50, 1, seed=3, shift=9.0)  # apart: W2 is at least W1
    assert exact_w2(a, b) >= wasserstein_distance(a[:, 0], b[:, 0])
    assert exact_w2(a, b) == pytest.approx(np.sqrt(((np.sort(a[:, 0]) - np.sort(b[:, 0])) ** 2).mean()))


def test_exact_w2_of_unequal_sets_is_refused():
    with pytest.raises(ConfigError, match="60 and 50"):
        exact_w2(cloud(60, 2), cloud(50, 2))
