import pytest

from dispersive_kit.data import load_images
from dispersive_kit.evaluation import make_extractor


@pytest.fixture(scope="session")
def digits():
    """Training and held-out images."""
    return load_images("digits"), load_images("digits", "test")


@pytest.fixture(scope="session")
def space(digits):
    return make_extractor("pixels-pca32", *digits)


@pytest.fixture(scope="session")
def classifier(digits):
    return make_extractor("auto", *digits)
