"""Files are whole or not there, one process has a lock, and shipped files are read only as they were listed."""

import errno
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from encode_jobs import CLEAN, hold

from dispersive_kit.data import files
from dispersive_kit.data.files import ARTEFACTS, SUMS, artefact, atomic_write, lock, versions, write_json
from dispersive_kit.errors import CheckpointError, DataError, KitError


def test_a_file_that_was_not_finished_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "one.json"
    write_json(file, {"a": 1})
    with pytest.raises(RuntimeError), atomic_write(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
    with pytest.raises(CheckpointError, match=r"one\.json could not be written .*disk full.* untouched: make room"):
        write_json(file, {"a": 2}, CheckpointError)
    assert json.loads(file.read_text()) == {"a": 1} and [p.name for p in file.parent.iterdir()] == ["one.json"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for content in ("first", "second"):
        (tmp_path / f"{files.PARTIAL}removed-run" / "left by a kill").mkdir(parents=True)
        with atomic_write(tmp_path / "run") as partial:
            partial.mkdir()
            (partial / content).write_text(content)
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "second"]


def test_a_lock_is_refused_while_another_holds_it_and_free_once_it_was_killed(tmp_path):
    file, held = tmp_path / ".lock", CLEAN.Event()
    other = CLEAN.Process(target=hold, args=(file, held))
    other.start()
    assert held.wait(120)
    with pytest.raises(CheckpointError, match="is at it"), lock(file, "another is at it", CheckpointError):
        pass
    other.kill()
    other.join()
    began = time.monotonic()
    with lock(file), pytest.raises(KitError, match="this one too"), lock(file, "this one too"):
        pass
    assert time.monotonic() - began < 30


def test_a_disk_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refuse(self, **options):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(files.FileLock, "acquire", refuse)
    with pytest.warns(UserWarning, match="has no locks"), lock(tmp_path / ".lock"):
        pass


def test_versions_name_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(files, "LIBRARIES", ["torch", "no-such-library"])
    found = versions()
    assert found["python"] and found["torch"] and found["no-such-library"] is None


# ---- shipped files


def test_every_shipped_file_is_listed_and_the_one_that_was_listed():
    subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=ARTEFACTS, check=True)
    listed = [line.partition("  ")[2] for line in (ARTEFACTS / SUMS).read_text().splitlines()]
    there = [p.relative_to(ARTEFACTS).as_posix() for p in ARTEFACTS.rglob("*") if p.is_file() and p.name != SUMS]
    assert sorted(listed) == sorted(there)


def test_a_sound_file_or_folder_is_given_and_a_changed_or_missing_one_named(tmp_path):
    (tmp_path / "run").mkdir()
    names = ("one.npz", "run/a", "run/b")
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / SUMS).write_text("".join(f"{files.file_sha256(tmp_path / name)}  {name}\n" for name in names))
    assert artefact("run", tmp_path) == tmp_path / "run"
    assert artefact("one.npz", tmp_path).read_bytes() == b"one.npz"
    for name, spoil in (("b", lambda f: f.write_bytes(b"rUn/b")), ("a", Path.unlink)):
        spoil(tmp_path / "run" / name)
        with pytest.raises(DataError, match=rf"run/{name} is missing, or not the file that SHA256SUMS lists.*make_art"):
            artefact("run", tmp_path)
    for name in ("new", "ru"):
        with pytest.raises(DataError, match=f"no artefact '{name}' is listed"):
            artefact(name, tmp_path)
