import numpy as np
import pytest
from torch_fidelity.metric_fid import fid_statistics_to_metric

from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation import frechet_distance, frechet_interval
from dispersive_kit.evaluation.moments import frechet_from_statistics

RNG = np.random.default_rng(0)


def cloud(n=400, d=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def test_a_set_is_at_distance_zero_from_itself():
    assert frechet_distance(cloud(), cloud()) == pytest.approx(0, abs=1e-9)


def test_a_shift_costs_its_square():
    x, shift = cloud(), np.arange(12) / 3
    assert frechet_distance(x, x + shift) == pytest.approx((shift**2).sum(), rel=1e-9)


def test_scaling_costs_what_the_closed_form_says():
    x, a = cloud(), 1.7
    expected = (a - 1) ** 2 * np.trace(np.cov(x.T)) + ((a - 1) ** 2) * (x.mean(0) ** 2).sum()
    assert frechet_distance(x, a * x) == pytest.approx(expected, rel=1e-9)


def test_rotation_of_both_changes_nothing():
    x, y = cloud(), cloud(seed=1)
    q, _ = np.linalg.qr(RNG.normal(size=(12, 12)))
    assert frechet_distance(x @ q, y @ q) == pytest.approx(frechet_distance(x, y), rel=1e-9)


def test_diagonal_gaussians_give_the_sum_of_squared_differences_of_deviations():
    z = RNG.normal(size=(300, 5))
    z = np.linalg.qr(z - z.mean(0))[0] * np.sqrt(299)  # exactly white
    a, b = np.array([1, 2, 3, 4, 5.0]), np.array([2, 2, 1, 0.5, 4.0])
    assert frechet_distance(z * a, z * b) == pytest.approx(((a - b) ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(400, 300), (400, 30), (20, 30)], ids=["n > d", "mixed", "n < d"])
def test_equals_torch_fidelity(n, m):
    x, y = cloud(n, 40), cloud(m, 40, seed=2)
    statistics = [{"mu": f.mean(0), "sigma": np.cov(f.T)} for f in (x, y)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    # For n < d the oracle takes a root of a singular product, and is itself only right to some digits.
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6 if min(n, m) > 40 else 1e-3)


def test_the_bias_of_whitened_features_is_the_closed_form_once_for_each_sample():
    n, d = 600, 24
    expected = d / n + d * (d + 1) / (4 * n)
    draw = np.random.default_rng(0).normal
    exact, two = [], []
    for _ in range(12):
        x, y = draw(size=(n, d)), draw(size=(n, d))
        exact.append(frechet_from_statistics(x.mean(0), np.cov(x.T), np.zeros(d), np.eye(d)))
        two.append(frechet_distance(x, y))
    assert np.mean(exact) == pytest.approx(expected, rel=0.06)
    assert np.mean(two) == pytest.approx(2 * expected, rel=0.06)


@pytest.mark.parametrize(
    ("bad", "words"),
    [(np.zeros((1, 3)), "N >= 2"), (np.zeros(5), "N >= 2"), (np.full((4, 12), np.nan), "NaN")],
)
def test_bad_features_are_refused(bad, words):
    with pytest.raises(ConfigError, match=words):
        frechet_distance(bad, cloud())
    with pytest.raises(ConfigError, match="one extractor"):
        frechet_distance(cloud(d=3), cloud(d=4))


def test_the_interval_has_the_width_of_repeated_sampling():
    reference = np.random.default_rng(99).normal(size=(4000, 8))
    fresh = [frechet_distance(np.random.default_rng(s).normal(0.3, 1, (500, 8)), reference) for s in range(200)]
    spread = np.percentile(fresh, 97.5) - np.percentile(fresh, 2.5)
    widths = []
    for s in range(5):
        interval = frechet_interval(np.random.default_rng(s).normal(0.3, 1, (500, 8)), reference)
        assert interval.low < interval.value < interval.high
        widths.append(interval.high - interval.low)
    assert 0.7 < np.mean(widths) / spread < 1.4
