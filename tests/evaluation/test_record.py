import json

import pytest
import torch

from dispersive_kit.data import load_images
from dispersive_kit.evaluation import measure_frechet, pca, pixels
from dispersive_kit.evaluation.baselines import pixel_gaussian


@pytest.fixture(scope="module")
def digits():
    return load_images("digits"), load_images("digits", "test")


def test_a_number_carries_its_name_interval_floor_and_record(digits):
    train, test = digits
    record = measure_frechet(
        pixel_gaussian(train, 200), train, test, pca(pixels(train.images), train.images, 16), protocol={"seed": 3}
    )
    read = json.loads(record.to_json())
    assert read["name"] == "FD[pixels/pca16, N=200]" and "FID" not in str(record)
    assert read["low"] < read["value"] < read["high"] and read["floor"] > 0
    assert read["protocol"]["reference"]["sha256"] == test.sha256 and read["protocol"]["seed"] == 3


def test_real_images_measure_as_their_own_floor(digits):
    train, test = digits
    extractor = pca(pixels(train.images), train.images, 16)
    record = measure_frechet(train.images[:300], train, test, extractor)
    assert record.value == pytest.approx(record.floor)


def test_the_gaussian_has_the_moments_of_the_pixels(digits):
    train, _ = digits
    drawn = pixel_gaussian(train, 4000, seed=1).float()
    inner = train.images.float()[:, :, 2:6, 2:6]  # where clamping at 0 and 255 matters least
    assert torch.allclose(drawn[:, :, 2:6, 2:6].mean(0), inner.mean(0), atol=15)
    assert not torch.equal(pixel_gaussian(train, 5, seed=1), pixel_gaussian(train, 5, seed=2))
