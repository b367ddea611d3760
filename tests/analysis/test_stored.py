"""The numbers that come with the package: of the shipped weights, and made by the script of a checkout."""

import runpy
from pathlib import Path

import pytest

from dispersive_kit.analysis import stored
from dispersive_kit.errors import DataError

SCRIPT = Path(__file__).parents[2] / "data" / "make_artefacts.py"


def test_a_file_that_is_not_listed_is_refused():
    with pytest.raises(DataError, match="no artefact"):
        stored("none.npz")


def test_the_classroom_file_is_made_from_the_shipped_runs():
    """Its images are those that are drawn today, up to the last bits of another machine."""
    film = runpy.run_path(str(SCRIPT))["film"]
    kept = stored("classroom.npz")["film/digits/base/2"][-1, :4].int()
    assert (film("digits-long-base", 2.0)[-1, :4].int() - kept).abs().float().mean() < 2
