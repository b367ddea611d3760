"""Folders of photographs and stores of latents for the tests of this room."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers, here and in the processes that tests start

from encode_jobs import write_photos


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """30 photographs of three classes."""
    return write_photos(tmp_path_factory.mktemp("photos"), ["n01", "n02", "n03"], 30)
