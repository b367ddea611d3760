import pytest
import torch

from dispersive_kit.analysis import random_network
from dispersive_kit.data import ImageSet, load_images
from dispersive_kit.models import DiT, build_dit


@pytest.fixture(scope="session")
def digits() -> ImageSet:
    return load_images("digits").subset(torch.arange(200))


@pytest.fixture(scope="session")
def network() -> DiT:
    """Three small blocks with random weights that act."""
    model = build_dit("DiT-T/2", input_size=8, in_channels=1, depth=3, hidden_size=24, num_heads=2, num_classes=10)
    return random_network(model, seed=1)
