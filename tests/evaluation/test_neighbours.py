"""Precision, recall, density and coverage against torch-fidelity and prdc; copies of training images are found."""

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from sklearn.neighbors import NearestNeighbors
from torch_fidelity.metric_prc import prc_features_to_metric

from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation import frechet_distance, memorisation, neighbours
from dispersive_kit.evaluation.distances import half_samples
from dispersive_kit.evaluation.neighbours import nearest_rows, prdc


def cloud(n, d=8, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=(n, d))


def values(x, y, k=5):
    return {name: value for name, (value, _) in prdc(x, y, np.zeros((0, len(x)), dtype=bool), k=k).items()}


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_equal_torch_fidelity(k):
    x, y = cloud(150, scale=1.2), cloud(130, seed=1)
    generated, real = torch.from_numpy(x), torch.from_numpy(y)
    expected = prc_features_to_metric(
        generated, real, prc_neighborhood=k, prc_batch_size=50, save_cpu_ram=False, verbose=False
    )
    ours = values(x, y, k)
    assert (ours["precision"], ours["recall"]) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)
    assert 0 < ours["precision"] < 1 and 0 < ours["recall"] < 1


@pytest.mark.parametrize("k", [3, 5])
def test_all_four_equal_prdc_where_no_distance_ties(k):
    x, y = cloud(150, scale=1.2), cloud(130, seed=1)
    assert values(x, y, k) == pytest.approx(compute_prdc(real_features=y, fake_features=x, nearest_k=k))


def test_a_set_covers_itself_though_every_distance_ties():
    x = cloud(80)
    ours = values(x, x.copy())
    assert ours["precision"] == ours["recall"] == ours["coverage"] == 1
    # With `<`, as the code of prdc has it, copies of points that all stand double fall out of every ball.
    doubled = np.concatenate([cloud(40)] * 2)
    assert values(doubled, doubled.copy(), k=1) == {"precision": 1, "recall": 1, "density": 2, "coverage": 1}


def test_a_generator_of_one_image_has_precision_and_no_recall():
    real = cloud(200)
    ours = values(np.repeat(real[:1], 50, axis=0), real)
    assert ours["precision"] == 1 and ours["recall"] <= 1 / 200 and ours["coverage"] < 0.2


def two_classes(share, seed):
    """400 features of two classes far apart, the first with this share."""
    return cloud(400, seed=seed) + 20.0 * (np.arange(400) >= 400 * share)[:, None]


def test_wrong_proportions_of_classes_are_seen_by_the_distance_and_by_none_of_the_four():
    real, skewed, fair = two_classes(0.5, 1), two_classes(0.9, 2), two_classes(0.5, 3)
    assert frechet_distance(skewed, real) > 20 * frechet_distance(fair, real)
    expected, ours = values(fair, real), values(skewed, real)
    for name in ("precision", "recall", "density"):
        assert ours[name] > 0.85 * expected[name], name
    assert ours["coverage"] > 0.7 * expected["coverage"]  # few samples of a class still come near most of its images


def test_local_spread_is_seen_by_coverage_and_hardly_by_the_distance():
    real = cloud(1000)
    repeated = np.repeat(cloud(100, seed=2), 10, axis=0) + 1e-3 * cloud(1000, seed=3)
    assert values(repeated, real)["coverage"] < 0.5 * values(cloud(1000, seed=4), real)["coverage"]
    assert frechet_distance(repeated, real) < 0.2 * frechet_distance(real + 0.5, real)


def test_far_samples_have_none_of_it():
    assert set(values(cloud(60) + 100, cloud(60, seed=1)).values()) == {0}


def test_the_same_bits_come_from_chunks_of_any_size(monkeypatch):
    x, y, halves = cloud(120), cloud(90, seed=1), half_samples(120, 4)
    whole = prdc(x, y, halves)
    monkeypatch.setattr(neighbours, "CHUNK", 7)
    chunked = prdc(x, y, halves)
    for name in whole:
        assert whole[name][0] == chunked[name][0]
        np.testing.assert_array_equal(whole[name][1], chunked[name][1])


def test_values_on_halves_are_those_of_the_halves():
    x, y, halves = cloud(120), cloud(90, seed=1), half_samples(120, 6)
    found = prdc(x, y, halves, k=3)
    for i, half in enumerate(halves):
        alone = values(x[half], y, k=3)
        assert {name: on_halves[i] for name, (_, on_halves) in found.items()} == pytest.approx(alone)


def test_too_few_images_are_refused():
    with pytest.raises(ConfigError, match="too few for 5 neighbours"):
        prdc(cloud(10), cloud(50, seed=1), half_samples(10, 3))


def test_nearest_rows_are_those_of_scikit_learn():
    x, y = cloud(40), cloud(70, seed=1)
    distance, index = nearest_rows(x, y)
    expected, rows = NearestNeighbors(n_neighbors=1).fit(y).kneighbors(x)
    np.testing.assert_allclose(distance, expected[:, 0])
    np.testing.assert_array_equal(index, rows[:, 0])


def test_copies_of_training_images_are_found_and_fresh_ones_are_not():
    train, held_out = cloud(400), cloud(300, seed=1)
    fresh = memorisation(cloud(300, seed=2), held_out, train)
    assert fresh.ratio.low < 1 < fresh.ratio.high and fresh.copies < 0.05
    copied = memorisation(train[:300] + 0.01 * cloud(300, seed=3), held_out, train)
    assert copied.ratio.value < 0.05 and copied.copies == 1
    np.testing.assert_array_equal(copied.index, np.arange(300))
    assert copied.floor == fresh.floor == pytest.approx(1, abs=0.1)


def test_half_copies_show_in_the_share_before_the_median():
    train, held_out = cloud(400), cloud(300, seed=1)
    mixed = np.concatenate([train[:60], cloud(240, seed=2)])
    assert memorisation(mixed, held_out, train).copies == pytest.approx(0.2, abs=0.04)


def test_splits_that_share_images_are_refused():
    with pytest.raises(ConfigError, match="not apart"):
        memorisation(cloud(50), cloud(100)[:50], cloud(100))


def test_copies_are_found_also_where_held_out_images_stand_in_the_training_set_too():
    rng = np.random.default_rng(0)
    train, held_out = rng.normal(size=(200, 4)), rng.normal(size=(100, 4))
    held_out[:3] = train[:3]
    assert memorisation(train[:50], held_out, train).copies == 1.0
