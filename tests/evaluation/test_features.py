import hashlib

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch_fidelity import feature_extractor_inceptionv3

from dispersive_kit.data import load_images
from dispersive_kit.errors import CheckpointError, ConfigError
from dispersive_kit.evaluation import features as features_module
from dispersive_kit.evaluation import inception, pca, pixels, small_classifier
from dispersive_kit.evaluation.features import effnet_lite0, make_extractor, random_convolutions
from dispersive_kit.models import efficientnet


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
    extractor = make_extractor("effnet-lite0-pca64", train.subset(torch.arange(65)), test)
    assert extractor.name == "effnet-lite0/pca64" and extractor(test.images[:4]).shape == (4, 64)


def test_an_unknown_extractor_names_those_there_are(digits):
    with pytest.raises(ConfigError, match="pixels-pca32"):
        make_extractor("resnet", *digits)


def test_random_convolutions_are_a_function_of_their_seed(digits):
    images = digits[1].images[:60]
    one, again, other = (random_convolutions(1, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one(images), again(images))
    assert one.weights_sha256 == again.weights_sha256 != other.weights_sha256
    assert one(images).shape == (60, 64) and np.isfinite(one(images)).all() and one(images).std() > 0.1


def test_pca_is_the_one_of_scikit_learn_and_does_not_depend_on_streaming(digits):
    train, test = digits
    extractor = pca(pixels(train.images), train.images, 10)
    expected = (
        PCA(10, svd_solver="full").fit(pixels(train.images)(train.images)).transform(pixels(test.images)(test.images))
    )
    ours = extractor(test.images)
    signs = np.sign((ours * expected).sum(0))
    np.testing.assert_allclose(ours, expected * signs, atol=1e-4)


def test_pca_of_fewer_images_than_pixels_is_the_one_of_scikit_learn():
    images = torch.randint(256, (20, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = pca(pixels(images), images, 8)(images)  # 12,288 pixels: through their covariance it would take minutes
    theirs = PCA(8, svd_solver="full").fit_transform(pixels(images)(images).astype(np.float64))
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), rtol=1e-4, atol=1e-4)


def test_the_note_of_pca_says_on_which_images_it_was_fitted(digits):
    train, _ = digits
    notes = {pca(pixels(t), t, 4).note for t in (train.images, train.images, train.images[1:])}
    assert len(notes) == 2 and all("sha256" in note for note in notes)


def test_classifiers_give_logits_beside_features_and_pixels_do_not(digits, classifier):
    images, labels = digits[1].images[:100], digits[1].labels[:100]
    features, logits = classifier.features_and_logits(images)
    assert features.shape == (100, 48) and (logits.argmax(1) == labels.numpy()).mean() > 0.9
    assert pixels(images).features_and_logits(images)[1] is None


def test_effnet_gives_its_own_logits_from_one_pass(digits):
    extractor, images = effnet_lite0(), digits[1].images[:3]
    network = efficientnet.efficientnet_lite0()
    _, logits = extractor.features_and_logits(images)
    torch.testing.assert_close(torch.from_numpy(logits), network(efficientnet.preprocess(images)))


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download was attempted")

    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


def test_missing_inception_weights_are_named_and_never_downloaded(tmp_path, no_download):
    with pytest.raises(CheckpointError, match="weights-inception-2015-12-05"):
        inception(tmp_path / "none.pth")


def test_other_inception_weights_are_refused_by_hash(tmp_path, no_download):
    (tmp_path / "other.pth").write_bytes(b"not the network")
    with pytest.raises(CheckpointError, match="sha256"):
        inception(tmp_path / "other.pth")


def test_inception_gives_what_torch_fidelity_gives(tmp_path, no_download, monkeypatch):
    """On a network without training: the trained weights are 96 MB that nobody here may download."""

    class Untrained(feature_extractor_inceptionv3.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args):
            pass

    file = tmp_path / "weights.pth"
    torch.save({}, file)
    oracle = Untrained("oracle", ["2048", "logits_unbiased"], file)
    torch.save(oracle.state_dict(), file)
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    images = torch.randint(0, 256, (2, 1, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = oracle(images.expand(-1, 3, -1, -1))
    features, logits = inception(file).features_and_logits(images)
    torch.testing.assert_close(torch.from_numpy(features), expected[0])
    torch.testing.assert_close(torch.from_numpy(logits), expected[1])
