"""A CIFAR-10 of real photographs in miniature, and how tests start the command line."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import warm

from dispersive_kit.data import load_images

sys.path.append(str(Path(__file__).parents[1] / "data"))  # for `import latent_stores`


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a cifar10.npz of 96 training and 32 test images, crops of photographs."""
    folder = tmp_path_factory.mktemp("data")
    images = torch.cat([load_images("photos", split).images[:n] for split, n in (("train", 96), ("test", 32))])
    np.savez(
        folder / "cifar10.npz",
        images=images.permute(0, 2, 3, 1).numpy(),
        labels=np.arange(128) % 10,
        split=(np.arange(128) >= 96).astype(int),
        classes=np.array([str(i) for i in range(10)]),
    )
    return folder


@pytest.fixture(scope="session")
def start() -> Callable[..., warm.Started]:
    return lambda arguments, processes=1: warm.start("dispersive-kit", *arguments, processes=processes)


@pytest.fixture(scope="session")
def run_command() -> Callable[..., str]:
    return lambda arguments, processes=1: warm.run("dispersive-kit", *arguments, processes=processes)
