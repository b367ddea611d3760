import numpy as np
import pytest
import torch

from dispersive_kit.data import load_images
from dispersive_kit.errors import ConfigError, DataError
from dispersive_kit.evaluation import Moments, frechet_distance, pixels, stream_moments
from dispersive_kit.evaluation.features import random_convolutions
from dispersive_kit.evaluation.moments import (
    frechet_from_statistics,
    load_statistics,
    merge,
    save_statistics,
    stated_extractor,
)


def cloud(n=300, d=10, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + offset


def from_features(x, y):
    return frechet_from_statistics(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))


@pytest.mark.parametrize("offset", [0.0, 1e6], ids=["centred", "far from zero"])
@pytest.mark.parametrize("batch", [1, 7, 300])
def test_moments_are_those_of_all_rows_whatever_the_batch_size(batch, offset):
    x = cloud(offset=offset)
    moments = merge(Moments.of(x[i : i + batch]) for i in range(0, len(x), batch))
    assert moments.n == 300
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(x.T), rtol=1e-9, atol=1e-9)


def test_moments_do_not_depend_on_how_parts_are_grouped():
    parts = [Moments.of(cloud(n, seed=n, offset=50.0)) for n in (5, 90, 2, 31)]
    left, right = (parts[0] + parts[1]) + (parts[2] + parts[3]), merge(reversed(parts))
    np.testing.assert_allclose(left.scatter, right.scatter, rtol=1e-12, atol=1e-9)


def test_images_are_streamed_to_the_same_moments_in_any_batch_size():
    images = load_images("digits", "test").images
    whole, parts = (stream_moments(pixels(images), images, batch_size=size) for size in (500, 13))
    np.testing.assert_allclose(parts.covariance, whole.covariance, rtol=1e-12, atol=1e-14)


def test_moments_of_nothing_and_of_one_row_are_refused():
    with pytest.raises(ConfigError, match="no features"):
        merge([])
    with pytest.raises(ConfigError, match="at least two"):
        _ = Moments.of(np.zeros((1, 3))).covariance


@pytest.mark.parametrize(("n", "m"), [(300, 200), (300, 6), (5, 6)], ids=["n > d", "mixed", "n < d"])
def test_the_distance_from_statistics_is_the_one_from_features(n, m):
    x, y = cloud(n), cloud(m, seed=1)
    assert from_features(x, y) == pytest.approx(frechet_distance(x, y), rel=1e-6)


def test_statistics_of_a_set_are_at_distance_zero_from_themselves():
    assert from_features(cloud(), cloud()) == pytest.approx(0, abs=1e-9)


def test_a_shift_costs_its_square_from_statistics_too():
    x, shift = cloud(), np.arange(10) / 3
    assert from_features(x, x + shift) == pytest.approx((shift**2).sum(), rel=1e-9)


def test_statistics_of_two_extractors_are_refused():
    x, y = cloud(), cloud(d=4)
    with pytest.raises(ConfigError, match="one extractor"):
        from_features(x, y)


def test_statistics_are_read_back_as_written(tmp_path):
    moments = Moments.of(cloud())
    save_statistics(tmp_path / "reference.npz", moments)
    with np.load(tmp_path / "reference.npz") as arrays:
        assert sorted(arrays) == ["mu", "sigma"]
    mu, sigma = load_statistics(tmp_path / "reference.npz")
    np.testing.assert_array_equal(mu, moments.mean)
    np.testing.assert_array_equal(sigma, moments.covariance)


def test_a_file_without_statistics_is_refused_by_name(tmp_path):
    np.savez(tmp_path / "other.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(DataError, match=r"other\.npz holds no reference statistics"):
        load_statistics(tmp_path / "other.npz")
    np.savez(tmp_path / "torn.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(DataError, match="do not belong together"):
        load_statistics(tmp_path / "torn.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match=r"text\.npz"):
        load_statistics(tmp_path / "text.npz")


def test_a_covariance_keeps_float64_from_float32_features():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).numpy()
    assert Moments.of(x).scatter.dtype == np.float64


def test_statistics_say_of_which_extractor_they_are_and_those_of_another_are_refused(tmp_path):
    ours, other = random_convolutions(1), random_convolutions(1, seed=1)
    save_statistics(tmp_path / "ours.npz", Moments.of(cloud(d=ours.dim)), ours)
    assert stated_extractor(tmp_path / "ours.npz") == ours.weights_sha256
    load_statistics(tmp_path / "ours.npz", ours.weights_sha256)
    with pytest.raises(ConfigError, match="of an extractor with weights"):
        load_statistics(tmp_path / "ours.npz", other.weights_sha256)
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    with pytest.raises(DataError, match="NaN"):
        load_statistics(tmp_path / "nan.npz")
    with (tmp_path / "array.npz").open("wb") as file:  # a .npy by another name
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match=r"array\.npz holds no reference statistics"):
        load_statistics(tmp_path / "array.npz")
