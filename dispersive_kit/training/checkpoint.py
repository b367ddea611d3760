"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a lost run.

A checkpoint is a folder `checkpoints/step-00000500/` of safetensors files and a `manifest.json` that holds the
small state and the sha256 of each file. It is written under another name, flushed to disk and then renamed, so a
folder that has the right name is whole. Nothing is pickled.
"""

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dispersive_kit.errors import CheckpointError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Step count after which it was taken, named groups of tensors, and JSON state."""

    step: int
    groups: dict[str, Tensors]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep_last: int | None = 2) -> Path:
    """Write `folder/step-XXXXXXXX` atomically, then remove all but the newest `keep_last` (None: keep all).

    Raises:
        CheckpointError: it could not be written (disk full, no permission); older checkpoints are untouched.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    partial = folder / f".partial-{final.name}-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        hashes = {}
        for name, tensors in checkpoint.groups.items():
            file = partial / f"{name}.safetensors"
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, file)
            hashes[file.name] = _sha256(file)
            _flush(file)
        manifest = {"step": checkpoint.step, "sha256": hashes, "state": checkpoint.state}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2))
        _flush(partial / "manifest.json")
        if final.exists():  # the same step of an earlier attempt
            shutil.rmtree(final)
        partial.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} could not be written ({error}). Earlier checkpoints are untouched: "
            "make room or choose another folder, then go on with --resume"
        ) from error
    abandoned = folder.glob(".partial-*")  # of a writer that was killed
    outdated = checkpoints(folder)[:-keep_last] if keep_last else []
    for old in [*outdated, *abandoned]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and verify every file against its sha256.

    Raises:
        CheckpointError: a file is missing, truncated or altered; the message names it.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        groups = {}
        for file_name, expected in manifest["sha256"].items():
            if _sha256(path / file_name) != expected:
                raise CheckpointError(f"{path / file_name} is damaged: its sha256 is not the one in manifest.json")
            groups[file_name.removesuffix(".safetensors")] = load_file(path / file_name)
        return Checkpoint(manifest["step"], groups, manifest["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None if there is none at all. A damaged newer one is reported.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    found = checkpoints(folder)
    faults = []
    for path in reversed(found):
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            warnings.warn(f"{fault}; going back to {path.name}", stacklevel=2)
        return checkpoint
    if found:
        raise CheckpointError(f"no checkpoint in {folder} is whole: {'; '.join(faults)}. Start a new run")
    return None


def flatten_optimizer(state_dict: dict[str, Any]) -> tuple[Tensors, list[dict[str, Any]]]:
    """Split an optimizer's state_dict into tensors (for safetensors) and parameter groups (for JSON)."""
    tensors = {
        f"{index}.{name}": value for index, entry in state_dict["state"].items() for name, value in entry.items()
    }
    return tensors, state_dict["param_groups"]


def unflatten_optimizer(tensors: Tensors, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
