"""Files that several processes write, any of which may be killed: whole or not there, and never two at one."""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dispersive_kit.errors import DataError


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def lock(file: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process may have it; freed by the system when the process ends, however it ends.

    Raises:
        DataError: the disk has no locks.
    """
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise DataError(
                f"{file} cannot be locked ({error.strerror}), so two processes could write one file: mount the disk "
                "with locks, or choose one that has them"
            ) from error
        yield True


def write_whole(file: Path, content: bytes) -> None:
    """Write a file so that it has its name only once all of it is on the disk.

    Raises:
        DataError: it could not be written, as on a full disk.
    """
    partial = file.with_name(f".partial-{platform.node()}-{os.getpid()}-{file.name}")
    try:
        with partial.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        partial.rename(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(
            f"{file} could not be written ({error}). What is finished stays: make room, and give the command again"
        ) from error


def require_file(file: Path) -> None:
    """Before long work: that its result can be written to `file`.

    Raises:
        DataError: it is a folder, or lies where nothing may be written.
    """
    if file.is_dir():
        raise DataError(f"{file} is a folder: name a file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{file} cannot be written ({error.strerror}): name another place") from error
    try:
        with tempfile.TemporaryFile(dir=file.parent):  # os.access says yes to root, also where nobody may write
            pass
    except OSError as error:
        raise DataError(f"{file} cannot be written ({error.strerror}): name another place") from error


def free_bytes(folder: Path) -> int:
    """Room on the disk on which `folder` lies, or will lie."""
    there = next(p for p in [folder, *folder.resolve().parents] if p.exists())
    return shutil.disk_usage(there).free
