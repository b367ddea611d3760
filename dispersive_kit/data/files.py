"""Atomic file writes, locks for one writer at a time, and shipped files, checked against their sha256."""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from dispersive_kit.errors import DataError, KitError, form_error

Form = TypeVar("Form")
PARTIAL = ".partial-"  # start of the name of what is being written or removed
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # errors of a disk without locks
LIBRARIES = ("dispersive-kit", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "accelerate",
             "torch-fidelity", "papermill", "nbclient", "ipykernel", "ipywidgets")  # fmt: skip
ARTEFACTS = Path(__file__).resolve().parents[1] / "artefacts"
SUMS = "SHA256SUMS"  # lists them in the form of `sha256sum -c`


@contextlib.contextmanager
def writing(what: Path, error: type[KitError] = DataError) -> Iterator[None]:
    """Turn a failed write into an error that says what is safe and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as fault:
        raise error(
            f"{what} could not be written ({fault}). What was finished before is untouched: make room or choose "
            "another folder, then give the command again (for a training run, with --resume)"
        ) from fault


@contextlib.contextmanager
def reading(what: Path, error: type[KitError] = DataError) -> Iterator[None]:
    """Turn a failed read into an error that names the file or folder, so that it is not taken for missing."""
    try:
        yield
    except OSError as fault:
        raise error(f"{what} cannot be read ({fault.strerror}): check the disk and the permissions") from fault


@contextlib.contextmanager
def atomic_write(target: Path, error: type[KitError] = DataError) -> Iterator[Path]:
    """Yield a temporary name for a file or folder; it is renamed to `target` once all of it is on the disk.

    If that fails, `error` is raised. The old content of `target` is then still there, as after a kill.
    """
    partial = target.with_name(f"{PARTIAL}{platform.node()}-{os.getpid()}-{target.name}")
    with writing(target, error):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            for path in [*(partial.rglob("*") if partial.is_dir() else ()), partial]:
                _flush(path)
            old = target.with_name(f"{PARTIAL}removed-{target.name}")
            if target.is_dir():  # a folder cannot be replaced in one operation: for a moment there is none
                _remove(old)  # left by a kill while it was removed
                target.rename(old)
            partial.replace(target)
            _flush(target.parent)
            _remove(old)
        finally:
            _remove(partial)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    if os.name != "nt":  # Windows cannot flush folders, nor files opened for reading
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def lock(file: Path, busy: str = "", error: type[KitError] = KitError) -> Iterator[None]:
    """Hold an exclusive lock on `file`, also within this process; it is released when the process ends or is killed.

    If another holds it, this raises `error` with the message `busy`, or waits if `busy` is empty. On a disk without
    locks there is a warning, and no lock.
    """
    held = FileLock(file, thread_local=False, fallback_to_soft=False)
    try:
        held.acquire(timeout=0 if busy else -1)
    except Timeout:
        raise error(busy) from None
    except OSError as fault:
        if fault.errno not in NO_LOCKS:
            raise error(f"{file} cannot be locked: {fault}") from fault
        warnings.warn(f"the disk of {file} has no locks: start no second process in that folder", stacklevel=3)
    try:
        yield
    finally:
        held.release()


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, value: Any, error: type[KitError] = DataError) -> None:
    """Write a JSON file; a kill leaves either the old content or all of the new."""
    with atomic_write(file, error) as partial:
        partial.write_text(json.dumps(value, indent=2))


def read_form(file: Path, form: type[Form], cure: str = "", error: type[KitError] = DataError) -> Form:
    """A JSON file in a form that pydantic knows; `error` if it is missing or damaged, with field, value and cure."""
    try:
        with reading(file, error):
            return TypeAdapter(form).validate_python(json.loads(file.read_text()))
    except ValidationError as fault:
        raise error(f"{form_error(fault, f'{file} is damaged')}. {cure}".removesuffix(". ")) from fault
    except (ValueError, RecursionError) as fault:
        raise error(f"{file} is damaged: {fault}. {cure}".removesuffix(". ")) from fault


def list_folder(folder: Path) -> list[Path]:
    """The paths in a folder, sorted; none if it is missing or no folder; DataError if it cannot be read."""
    with reading(folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(folder.iterdir())
    return []


def require_writable(file: Path) -> None:
    """Raise DataError, before long work, if its result could not be written to `file`."""
    if file.is_dir():
        raise DataError(f"{file} is a folder: name a file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()  # for root os.access is True even where writing fails
    except OSError as error:
        raise DataError(f"{file} cannot be written ({error.strerror}): name another place") from error


def notebook_stdout() -> Any:
    """For tqdm: stdout in a notebook, where stderr looks like an error; None, which is stderr, elsewhere."""
    return sys.stdout if type(sys.stdout).__module__.startswith("ipykernel") else None


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(next(p for p in [folder, *folder.resolve().parents] if p.exists())).free


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that a result may depend on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), **dict.fromkeys(LIBRARIES)}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def artefact(name: str, folder: Path = ARTEFACTS) -> Path:
    """Path of a shipped file or folder; DataError unless every file of it has the listed sha256."""
    with reading(folder / SUMS):
        listed = [line.partition("  ") for line in (folder / SUMS).read_text().splitlines()]
    own = [(digest, folder / file) for digest, _, file in listed if f"{file}/".startswith(f"{name}/")]
    if not own:
        raise DataError(f"no artefact {name!r} is listed in {folder / SUMS}")
    if wrong := [file for digest, file in own if not file.is_file() or file_sha256(file) != digest]:
        raise DataError(
            f"{wrong[0]} is missing, or not the file that {SUMS} lists: install the package again, or make the file "
            "again with data/make_artefacts.py in a checkout"
        )
    return folder / name
