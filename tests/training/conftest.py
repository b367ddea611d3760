"""A CIFAR-10 of real photographs in miniature, and how tests start the command line."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dispersive_kit.data import load_images

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
CLI = ["-m", "dispersive_kit.cli"]


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


def start_command(arguments: list[object], processes: int = 1) -> subprocess.Popen:
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


def finish_command(arguments: list[object], processes: int = 1) -> str:
    """Run it to the end and return what it printed; fails with that if it fails."""
    process = start_command(arguments, processes)
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen]:
    return start_command


@pytest.fixture(scope="session")
def run_command() -> Callable[..., str]:
    return finish_command
