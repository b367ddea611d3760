"""KID, MMD and energy distance against torch-fidelity, SciPy and what a sum over pairs written out gives."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import pdist
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from torch_fidelity.metric_kid import kid_features_to_metric

from dispersive_kit.evaluation import kernels
from dispersive_kit.evaluation.distances import half_samples
from dispersive_kit.evaluation.kernels import mmd2

NO_HALVES = np.zeros((0, 90), dtype=bool)
KERNELS = {"polynomial": kernels.polynomial, "rbf": kernels.rbf(3.0), "energy": kernels.minus_distance}


def cloud(n=90, d=6, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


def u_statistic(x, y, kernel):
    kx, ky, kxy = kernel(x, x), kernel(y, y), kernel(x, y)
    n, m = len(x), len(y)
    return (kx.sum() - np.trace(kx)) / (n * (n - 1)) + (ky.sum() - np.trace(ky)) / (m * (m - 1)) - 2 * kxy.mean()


def torch_fidelity(x, y, **options):
    """With one subset of all N images, in float64, where torch-fidelity's mean over subsets is the full sample's."""
    x, y = (torch.from_numpy(f) for f in (x, y))
    options = {"kid_subsets": 1, "kid_subset_size": len(x), "verbose": False, **options}
    return kid_features_to_metric(x, y, **options)["kernel_inception_distance_mean"]


def test_kid_equals_torch_fidelity():
    x, y = cloud(), cloud(seed=1, shift=0.4)
    assert mmd2(x, y, kernels.polynomial, NO_HALVES)[0] == pytest.approx(torch_fidelity(x, y), rel=1e-9)


def test_mmd_rbf_equals_torch_fidelity():
    x, y = cloud(), cloud(seed=1, shift=0.4)
    expected = torch_fidelity(x, y, kid_kernel="rbf", kid_kernel_rbf_sigma=2.5)
    assert mmd2(x, y, kernels.rbf(2.5), NO_HALVES)[0] == pytest.approx(expected, rel=1e-9)


def test_kernels_equal_those_of_scikit_learn():
    x, y = cloud(), cloud(50, seed=1)
    np.testing.assert_allclose(kernels.polynomial(x, y), polynomial_kernel(x, y, degree=3, gamma=1 / 6, coef0=1))
    np.testing.assert_allclose(kernels.rbf(2.0)(x, y), rbf_kernel(x, y, gamma=1 / 8))
    assert kernels.median_distance(x) == pytest.approx(np.median(pdist(x)))


def test_energy_distance_on_a_line_equals_scipy():
    x, y = cloud(d=1), cloud(70, d=1, seed=1, shift=0.5)
    ours = mmd2(x, y, kernels.minus_distance, NO_HALVES)[0]
    # SciPy counts the pairs of a point with itself; taking them out raises E|x - x'| by n / (n - 1).
    with_self = ours + sum(2 * pdist(z).sum() * (1 / (len(z) * (len(z) - 1)) - 1 / len(z) ** 2) for z in (x, y))
    assert with_self == pytest.approx(stats.energy_distance(x[:, 0], y[:, 0]) ** 2, rel=1e-9)


@pytest.mark.parametrize("name", KERNELS)
def test_values_on_halves_are_those_of_the_halves(name, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 17)  # rows that do not fill the last chunk
    x, y, halves = cloud(), cloud(41, seed=1), half_samples(90, 5)
    value, on_halves = mmd2(x, y, KERNELS[name], halves)
    assert value == pytest.approx(u_statistic(x, y, KERNELS[name]), rel=1e-9)
    np.testing.assert_allclose(on_halves, [u_statistic(x[half], y, KERNELS[name]) for half in halves], rtol=1e-8)


@pytest.mark.parametrize("name", KERNELS)
def test_the_statistic_is_unbiased_so_equal_laws_give_zero_on_average(name):
    values = [
        mmd2(cloud(60, seed=s), cloud(60, seed=s + 1000), KERNELS[name], NO_HALVES[:, :60])[0] for s in range(200)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0 < max(values)


def test_energy_and_rbf_are_unchanged_by_a_rotation_of_both():
    x, y = cloud(), cloud(seed=1, shift=0.3)
    q, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))
    for name in ("rbf", "energy"):
        turned, straight = (mmd2(a, b, KERNELS[name], NO_HALVES)[0] for a, b in ((x @ q, y @ q), (x, y)))
        assert turned == pytest.approx(straight, rel=1e-9)
