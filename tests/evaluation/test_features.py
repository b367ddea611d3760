"""Extractors: the same from the same data, their components those of scikit-learn, and weights that are known."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch_fidelity import feature_extractor_inceptionv3

from dispersive_kit.errors import CheckpointError, ConfigError, KitError
from dispersive_kit.evaluation import features as module
from dispersive_kit.evaluation import make_extractor
from dispersive_kit.evaluation.features import INCEPTION_WEIGHTS, _effnet_lite0, _pca, _pixels
from dispersive_kit.models import efficientnet


def test_the_classifier_knows_digits_and_says_how_well(digits, classifier):
    accuracy = float(classifier.note.split()[-1])
    assert accuracy > 0.94 and classifier.dim == 48 and len(classifier.weights_sha256) == 64
    images = digits[1].images[:100]
    apart = np.concatenate([classifier(part) for part in images.split(7)])
    assert apart.shape == (100, 48) and np.abs(classifier(images) - apart).max() < 1e-4  # whatever the batch


def test_one_class_teaches_no_classifier(digits):
    flat = replace(digits[0].subset(torch.arange(70)), labels=torch.zeros(70, dtype=torch.long), classes=("image",))
    with pytest.raises(ConfigError, match="one class"):
        make_extractor("classifier", flat, flat)
    assert make_extractor("auto", flat, flat).name == "effnet-lite0/pca64"


def test_pca_is_the_one_of_scikit_learn_and_says_on_which_images_it_was_fitted(digits, space):
    train, test = (data.images for data in digits)
    expected = PCA(32, svd_solver="full").fit(_pixels(train)(train)).transform(_pixels(test)(test))
    ours = space(test)
    np.testing.assert_allclose(ours, expected * np.sign((ours * expected).sum(0)), atol=1e-4)
    other = make_extractor("pixels-pca32", digits[0].subset(torch.arange(1, 1297)), digits[1])
    assert "sha256" in space.note and space.note != other.note


def test_pca_of_fewer_images_than_pixels_is_the_one_of_scikit_learn():
    images = torch.randint(256, (20, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = _pca(_pixels(images), images, 8)(images)  # 12,288 pixels: through their covariance it would take minutes
    theirs = PCA(8, svd_solver="full").fit_transform(_pixels(images)(images).astype(np.float64))
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_refused(digits):
    with pytest.raises(ConfigError, match="not possible"):
        _pca(_pixels(digits[0].images), digits[0].images, 65)
    with pytest.raises(ConfigError, match="to_uint8"):
        _pixels(digits[0].images)(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ConfigError, match="pixels-pca32"):
        make_extractor("resnet", *digits)


def test_effnet_names_itself_and_gives_the_features_of_its_network(digits):
    train, test = digits
    larger = replace(
        train.subset(torch.arange(65)), images=train.images[:65].repeat_interleave(5, 2).repeat(1, 1, 1, 5)
    )
    extractor = make_extractor("auto", larger, test)  # 40 pixels: a classifier would soon take hours
    assert extractor.name == "effnet-lite0/pca64" and extractor(test.images[:4]).shape == (4, 64)
    expected = efficientnet.efficientnet_lite0().features(efficientnet.preprocess(test.images[:3]))
    torch.testing.assert_close(torch.from_numpy(_effnet_lite0("cpu")(test.images[:3])), expected)


def test_processes_with_different_extractors_are_stopped(digits, space, monkeypatch):
    monkeypatch.setattr(module, "gathered", lambda own: [*own, "another"])
    with pytest.raises(KitError, match="pixels/pca32 differs between the processes"):
        space(digits[1].images[:4])


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The data folder; nothing is downloaded into it."""

    def refuse(*args, **kwargs):
        raise AssertionError("a download was attempted")

    monkeypatch.setenv("DISPERSIVE_KIT_DATA", str(tmp_path))
    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    return tmp_path


def test_missing_and_other_inception_weights_are_named_and_never_downloaded(digits, folder):
    with pytest.raises(CheckpointError, match="weights-inception-2015-12-05"):
        make_extractor("inception", *digits)
    (folder / INCEPTION_WEIGHTS).write_bytes(b"not the network")
    with pytest.raises(CheckpointError, match="sha256"):
        make_extractor("inception", *digits)


def test_inception_gives_what_torch_fidelity_gives(digits, folder, monkeypatch):
    """On a network without training: the trained weights are 96 MB that nobody here may download."""

    class Untrained(feature_extractor_inceptionv3.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args):
            pass

    file = folder / INCEPTION_WEIGHTS
    torch.save({}, file)
    oracle = Untrained("oracle", ["2048"], file)
    torch.save(oracle.state_dict(), file)
    monkeypatch.setattr(module, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    images = torch.randint(0, 256, (2, 1, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = make_extractor("inception", *digits)(images)
    torch.testing.assert_close(torch.from_numpy(found), oracle(images.expand(-1, 3, -1, -1))[0])
