"""Tests for a GPU: `make gpu`. Without one, or without the packages a file needs, they are left out, which is said.

GPU_TESTS=cpu runs them on a CPU, to see that the tests themselves are right.
"""

import importlib.util
import os

import pytest
import torch

DEVICE = os.environ.get("GPU_TESTS") or ("cuda" if torch.cuda.is_available() else "")
TRAINING = ("accelerate", "diffusers", "filelock", "pydantic", "safetensors", "skimage", "sklearn", "torchvision")
FAULTS = dict.fromkeys(("test_plugin.py", "test_training.py"), "no GPU") if not DEVICE else {}
if DEVICE:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products, before the first one
    if missing := [name for name in TRAINING if importlib.util.find_spec(name) is None]:
        FAULTS["test_training.py"] = f"not installed: {', '.join(missing)}"
collect_ignore = list(FAULTS)


def pytest_terminal_summary(terminalreporter):
    for file, fault in FAULTS.items():
        terminalreporter.write_line(f"left out: tests/gpu/{file} ({fault})")


@pytest.fixture
def device():
    return DEVICE
