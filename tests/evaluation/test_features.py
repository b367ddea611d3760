import numpy as np
import pytest
import torch

from dispersive_kit.data import load_images
from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation import pca, pixels, small_classifier
from dispersive_kit.evaluation.features import make_extractor


@pytest.fixture(scope="module")
def digits():
    return load_images("digits"), load_images("digits", "test")


@pytest.fixture(scope="module")
def classifier(digits):
    return small_classifier(*digits)


def test_the_classifier_knows_digits_and_says_how_well(classifier):
    accuracy = float(classifier.note.split()[-1])
    assert accuracy > 0.94 and classifier.dim == 48 and len(classifier.weights_sha256) == 64


def test_the_same_seed_trains_the_same_classifier(digits, classifier):
    assert small_classifier(*digits).weights_sha256 == classifier.weights_sha256


def test_features_do_not_depend_on_the_batch_size(digits, classifier):
    images = digits[1].images[:100]
    assert np.abs(classifier(images, batch_size=100) - classifier(images, batch_size=7)).max() < 1e-4


def test_pca_keeps_the_distances_within_its_span(digits):
    train = digits[0].images
    full, part = pixels(train)(train), pca(pixels(train), train, 64)(train)
    a, b = (np.linalg.norm(f[:50, None] - f[None, :50], axis=-1) for f in (full, part))
    assert part.shape == (1297, 64) and np.abs(a - b).max() < 1e-3


def test_pca_is_refused_more_components_than_there_are(digits):
    with pytest.raises(ConfigError, match="not possible"):
        pca(pixels(digits[0].images), digits[0].images, 65)


def test_floats_are_refused_with_the_cure(digits):
    with pytest.raises(ConfigError, match="to_uint8"):
        pixels(digits[0].images)(torch.zeros(2, 1, 8, 8))


def test_the_effnet_space_names_itself_and_tells_real_from_noise(digits):
    train, test = digits
    extractor = make_extractor("effnet-lite0-pca64", train.subset(torch.arange(128)), test)
    assert extractor.name == "effnet-lite0/pca64" and extractor(test.images[:4]).shape == (4, 64)


def test_an_unknown_extractor_names_those_there_are(digits):
    with pytest.raises(ConfigError, match="pixels-pca32"):
        make_extractor("inception", *digits)
