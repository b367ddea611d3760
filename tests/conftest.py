"""Two workers share two cores: each keeps to one thread, or they would wait for each other.

Also a plugin of the run over the notebooks (PYTHONPATH=tests, -p conftest): kernels without ports, which two workers
may take from each other.
"""

import os
import sys
from pathlib import Path

import jupyter_client
import pytest
import torch

from dispersive_kit.study.lab import Kernel

sys.path.insert(0, str(Path(__file__).parent))  # for `import warm`


# Fixtures that take 8 to 20 seconds: the tests that use one run in one worker, so that it is built once.
COSTLY = {"finished", "ended", "splits", "never_stopped"}


def pytest_configure(config: pytest.Config) -> None:
    jupyter_client.AsyncKernelManager = Kernel
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in COSTLY.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(fixture))
