"""A CIFAR-10 of real photographs in miniature, and how tests start the command line."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
CLI = ["-m", "dispersive_kit.cli"]


def crops(n: int, size: int = 32) -> np.ndarray:
    """n crops uint8 (n, size, size, 3) of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photos = [photo[::2, ::2] for photo in load_sample_images().images]
    corners = [(photos[i % 2], *rng.integers(0, np.array(photos[i % 2].shape[:2]) - size)) for i in range(n)]
    return np.stack([photo[top : top + size, left : left + size] for photo, top, left in corners])


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a cifar10.npz of 96 training and 32 test images."""
    folder = tmp_path_factory.mktemp("data")
    np.savez(
        folder / "cifar10.npz",
        images=crops(128),
        labels=np.arange(128) % 10,
        split=(np.arange(128) >= 96).astype(int),
        classes=np.array([str(i) for i in range(10)]),
    )
    return folder


def start(arguments: list[object], processes: int = 1) -> subprocess.Popen:
    """The command line in a process group of its own, on one or several processes."""
    launcher = [sys.executable] if processes == 1 else [*TORCHRUN, str(processes)]
    return subprocess.Popen(
        [*launcher, *CLI, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run_command(arguments: list[object], processes: int = 1) -> str:
    """Run it to the end and return what it printed; fails with that if it fails."""
    process = start(arguments, processes)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed
