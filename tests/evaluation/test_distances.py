"""Distances against closed forms and the reference codes; their values on halves, and the width of intervals."""

from functools import partial

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from scipy.stats import binomtest
from sklearn.neighbors import NearestNeighbors
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation import distances, frechet_distance
from dispersive_kit.evaluation.distances import (
    frechet_on_halves,
    half_samples,
    interval,
    kid,
    memorisation,
    prdc,
    wilson,
)
from dispersive_kit.evaluation.panel import METRICS, _ends, _measured


def cloud(n=400, d=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def ball(n, d=8, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=(n, d))


def none(n):
    return half_samples(n, 0)


def of_four(x, y, k=5):
    return {name: value for name, (value, _) in prdc(x, y, none(len(x)), k=k).items()}


def test_numbers_of_fixed_features_do_not_change():
    rng = np.random.default_rng(0)
    x, y, train = rng.normal(0.3, 1.2, (120, 16)), rng.normal(size=(100, 16)), rng.normal(size=(90, 16))
    halves = half_samples(120, 20)
    found = _measured(METRICS, x, y, halves)
    expected = {
        "FD": (3.6566057641496954, 2.910975727973008, 4.517383435024708),
        "KID": (0.31925647870332163, 0.195636630067009, 0.4403295169086163),
        "precision": (0.5916666666666667, 0.4949999999999999, 0.6616666666666665),
        "recall": (0.97, 0.948, 0.988),
        "density": (0.35833333333333334, 0.26241666666666674, 0.46299999999999997),
        "coverage": (0.83, 0.7059999999999998, 0.9452499999999997),
    }
    assert found.keys() == expected.keys()
    for name, (value, on_halves) in found.items():
        assert (value, *interval(value, on_halves)) == pytest.approx(expected[name], rel=1e-9), name
    near = memorisation(x, y, train, resamples=20)
    assert (near.ratio, near.low, near.high, near.floor, near.copies) == pytest.approx(
        (1.1734777726349446, 1.1382801876473503, 1.2176217066660318, 1.0090343437757678, 0), rel=1e-9
    )


def test_frechet_distance_has_its_closed_forms():
    x, shift, a = cloud(), np.arange(12) / 3, 1.7
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + shift) == pytest.approx((shift**2).sum(), rel=1e-9)
    scaled = (a - 1) ** 2 * (np.trace(np.cov(x.T)) + (x.mean(0) ** 2).sum())
    assert frechet_distance(x, a * x) == pytest.approx(scaled, rel=1e-9)
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    assert frechet_distance(x @ q, cloud(seed=1) @ q) == pytest.approx(frechet_distance(x, cloud(seed=1)), rel=1e-9)
    z = rng.normal(size=(300, 5))
    z = np.linalg.qr(z - z.mean(0))[0] * np.sqrt(299)  # exactly white
    one, two = np.array([1, 2, 3, 4, 5.0]), np.array([2, 2, 1, 0.5, 4.0])
    assert frechet_distance(z * one, z * two) == pytest.approx(((one - two) ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(400, 300), (400, 30), (20, 30)], ids=["n > d", "mixed", "n < d"])
def test_frechet_distance_equals_torch_fidelity(n, m):
    x, y = cloud(n, 40), cloud(m, 40, seed=2)
    statistics = [{"mu": f.mean(0), "sigma": np.cov(f.T)} for f in (x, y)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    # For n < d the oracle takes a root of a singular product, and is itself only right to some digits.
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6 if min(n, m) > 40 else 1e-3)


def test_the_bias_of_whitened_features_is_the_closed_form_once_for_each_sample():
    n, d = 600, 24
    draw = np.random.default_rng(0).normal
    found = [frechet_distance(draw(size=(n, d)), draw(size=(n, d))) for _ in range(12)]
    assert np.mean(found) == pytest.approx(2 * (d / n + d * (d + 1) / (4 * n)), rel=0.06)


@pytest.mark.parametrize(
    ("bad", "words"),
    [(np.zeros((1, 3)), "N >= 2"), (np.zeros(5), "N >= 2"), (np.full((4, 12), np.nan), "NaN")],
)
def test_bad_features_are_refused(bad, words):
    for measure in (frechet_distance, partial(kid, halves=none(4)), partial(prdc, halves=none(4))):
        with pytest.raises(ConfigError, match=words):
            measure(bad, cloud())
        with pytest.raises(ConfigError, match="3 and 4 features; use one extractor"):
            measure(cloud(d=3), cloud(d=4))


def test_kid_equals_torch_fidelity():
    x, y = ball(90, 6), ball(90, 6, seed=1) + 0.4
    options = {"kid_subsets": 1, "kid_subset_size": 90, "verbose": False}  # one subset of all, in float64
    expected = kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), **options)
    assert kid(x, y, none(90))[0] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)


def test_kid_is_unbiased_so_equal_laws_give_zero_on_average():
    values = [kid(ball(60, seed=s), ball(60, seed=s + 1000), none(60))[0] for s in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_to_coverage_equal_torch_fidelity_and_prdc(k):
    x, y = ball(150, scale=1.2), ball(130, seed=1)
    ours, options = of_four(x, y, k), {"prc_batch_size": 50, "save_cpu_ram": False, "verbose": False}
    expected = prc_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), prc_neighborhood=k, **options)
    assert (ours["precision"], ours["recall"]) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)
    assert ours == pytest.approx(compute_prdc(real_features=y, fake_features=x, nearest_k=k))  # where none ties
    assert 0 < ours["precision"] < 1 and 0 < ours["recall"] < 1


def test_a_set_covers_itself_though_every_distance_ties():
    ours = of_four(ball(80), ball(80))
    assert ours["precision"] == ours["recall"] == ours["coverage"] == 1
    # With `<`, as the code of prdc has it, copies of points that all stand double fall out of every ball.
    doubled = np.concatenate([ball(40)] * 2)
    assert of_four(doubled, doubled.copy(), k=1) == {"precision": 1, "recall": 1, "density": 2, "coverage": 1}


def test_one_image_has_precision_and_no_recall_and_far_samples_have_nothing():
    real = ball(200)
    ours = of_four(np.repeat(real[:1], 50, axis=0), real)
    assert ours["precision"] == 1 and ours["recall"] <= 1 / 200 and ours["coverage"] < 0.2
    assert set(of_four(ball(60) + 100, ball(60, seed=1)).values()) == {0}


def two_classes(share, seed):
    """400 features of two classes far apart, the first with this share."""
    return ball(400, seed=seed) + 20.0 * (np.arange(400) >= 400 * share)[:, None]


def test_wrong_proportions_of_classes_are_seen_by_the_distance_and_by_none_of_the_four():
    real, skewed, fair = two_classes(0.5, 1), two_classes(0.9, 2), two_classes(0.5, 3)
    assert frechet_distance(skewed, real) > 20 * frechet_distance(fair, real)
    expected, ours = of_four(fair, real), of_four(skewed, real)
    for name in ("precision", "recall", "density"):
        assert ours[name] > 0.85 * expected[name], name
    assert ours["coverage"] > 0.7 * expected["coverage"]  # few samples of a class still come near most of its images


def test_local_spread_is_seen_by_coverage_and_hardly_by_the_distance():
    real = ball(1000)
    repeated = np.repeat(ball(100, seed=2), 10, axis=0) + 1e-3 * ball(1000, seed=3)
    assert of_four(repeated, real)["coverage"] < 0.5 * of_four(ball(1000, seed=4), real)["coverage"]
    assert frechet_distance(repeated, real) < 0.2 * frechet_distance(real + 0.5, real)


def test_values_on_halves_are_those_of_the_halves_in_chunks_of_any_size(monkeypatch):
    x, y, halves = ball(120), ball(90, seed=1), half_samples(120, 6)
    whole = _measured(METRICS, x, y, halves)
    for i, half in enumerate(halves):
        alone = _measured(METRICS, x[half], y, none(60))
        assert {k: v[1][i] for k, v in whole.items()} == pytest.approx({k: v[0] for k, v in alone.items()}, rel=1e-8)
    monkeypatch.setattr(distances, "CHUNK", 7)
    chunked = _measured(METRICS, x, y, halves)
    for name, (value, on_halves) in whole.items():
        assert chunked[name][0] == (pytest.approx(value, rel=1e-9) if name == "KID" else value)
        np.testing.assert_allclose(chunked[name][1], on_halves, rtol=1e-8 if name == "KID" else 0)


def test_every_interval_has_the_width_of_repeated_sampling():
    y = np.random.default_rng(99).normal(size=(300, 4))

    def measured(seed, halves):
        x = np.random.default_rng(seed).normal(0.4, 1, (200, 4))  # a little off the reference's
        return _measured(METRICS, x, y, halves)

    fresh = [measured(seed, none(200)) for seed in range(100)]
    kept = [measured(1000 + seed, half_samples(200, 60)) for seed in range(5)]
    for name in fresh[0]:
        low, high = np.percentile([one[name][0] for one in fresh], [2.5, 97.5])
        ends = [_ends(name, *one[name], 200) for one in kept]
        assert 0.65 < np.mean([b - a for a, b in ends]) / (high - low) < 1.5, name


def test_shares_end_at_zero_and_one_and_a_full_precision_is_not_certain():
    assert _ends("precision", 1.0, np.ones(50), 200) == wilson(1.0, 200) and wilson(1.0, 200)[0] < 0.99
    assert _ends("coverage", 0.99, np.array([0.9, 0.95, 0.99]), 200)[1] == 1.0
    assert np.isnan(_ends("FD", *frechet_on_halves(cloud(), cloud(seed=1), none(400)), 400)).all()
    for right, n in ((0, 40), (31, 40), (40, 40)):
        theirs = binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_copies_of_training_images_are_found_and_fresh_ones_are_not():
    train, held_out = ball(400), ball(300, seed=1)
    fresh = memorisation(ball(300, seed=2), held_out, train)
    assert fresh.low < 1 < fresh.high and fresh.copies < 0.05
    copied = memorisation(train[:300] + 0.01 * ball(300, seed=3), held_out, train)
    assert copied.ratio < 0.05 and copied.copies == 1
    expected, rows = NearestNeighbors(n_neighbors=1).fit(train).kneighbors(train[:300] + 0.01 * ball(300, seed=3))
    np.testing.assert_allclose(copied.distance, expected[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(copied.index, rows[:, 0])
    assert copied.floor == fresh.floor == pytest.approx(1, abs=0.1)
    held_out[:3] = train[:3]  # found also where held-out images stand in the training set too
    assert memorisation(train[:50], held_out, train).copies == 1.0
    mixed = np.concatenate([train[:60], ball(240, seed=2)])  # half copies show in the share before the median
    assert memorisation(mixed, held_out[3:], train).copies == pytest.approx(0.2, abs=0.04)


def test_too_few_images_and_splits_that_share_images_are_refused():
    with pytest.raises(ConfigError, match="too few for 5 neighbours"):
        prdc(ball(10), ball(50, seed=1), half_samples(10, 3))
    with pytest.raises(ConfigError, match="not apart"):
        memorisation(ball(50), ball(100)[:50], ball(100))
