"""Shipped files are read only as they were listed."""

import subprocess
from pathlib import Path

import pytest

from dispersive_kit.data import artefacts
from dispersive_kit.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_bytes(b"first")
    (tmp_path / "run" / "b").write_bytes(b"second")
    (tmp_path / "one.npz").write_bytes(b"third")
    assert artefacts.seal(tmp_path) == 16
    return tmp_path


def test_every_shipped_file_is_the_one_that_was_listed() -> None:
    assert artefacts.faults() == []
    subprocess.run(["sha256sum", "--quiet", "-c", artefacts.SUMS], cwd=artefacts.FOLDER, check=True)


def test_a_sound_file_and_folder_are_given(folder: Path) -> None:
    assert artefacts.artefact("one.npz", folder).read_bytes() == b"third"
    assert artefacts.artefact("run", folder) == folder / "run"


def test_one_changed_byte_is_refused_and_the_file_named(folder: Path) -> None:
    artefacts.artefact("run", folder)
    (folder / "run" / "b").write_bytes(b"sEcond")
    with pytest.raises(DataError, match=r"run/b is not the file that SHA256SUMS lists.*artefacts build"):
        artefacts.artefact("run", folder)
    assert artefacts.artefact("one.npz", folder)
    assert len(artefacts.faults(folder)) == 1


def test_a_missing_file_and_an_unlisted_one_are_named(folder: Path) -> None:
    (folder / "run" / "a").unlink()
    (folder / "new").write_bytes(b"")
    with pytest.raises(DataError, match=r"run/a is missing"):
        artefacts.artefact("run", folder)
    with pytest.raises(DataError, match=r"no artefact 'new' is listed"):
        artefacts.artefact("new", folder)
    assert [fault.rpartition("/")[2] for fault in artefacts.faults(folder)] == [
        "a is missing",
        f"new is not listed in {artefacts.SUMS}",
    ]


def test_a_name_that_begins_like_another_is_not_it(folder: Path) -> None:
    with pytest.raises(DataError, match="no artefact 'ru'"):
        artefacts.artefact("ru", folder)
