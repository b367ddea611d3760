"""Two workers share two cores: each keeps to one thread, or they would wait for each other."""

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
