"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a lost run.

A checkpoint is a folder `checkpoints/step-00000500/` of safetensors files and a `manifest.json` that holds the
small state and the sha256 of each file. It is written under another name, flushed to disk and then renamed, so a
folder that has the right name is whole. Nothing is pickled.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dispersive_kit.data.files import PARTIAL, atomic_write, file_sha256
from dispersive_kit.errors import CheckpointError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Step count after which it was taken, named groups of tensors, and JSON state."""

    step: int
    groups: dict[str, Tensors]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep_last: int = 2) -> None:
    """Write `folder/step-XXXXXXXX` atomically, then remove all but the newest `keep_last`.

    A checkpoint of a later step goes too: the run went back from it, so it is damaged.

    Raises:
        CheckpointError: it could not be written (disk full, no permission); older checkpoints are untouched.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    _discard(folder.glob(f"{PARTIAL}*"))  # of a writer that was killed; before, since its room may be needed
    with atomic_write(final, CheckpointError) as partial:
        partial.mkdir()
        hashes = {}
        for name, tensors in checkpoint.groups.items():
            file = partial / f"{name}.safetensors"
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, file)
            hashes[file.name] = file_sha256(file)
        manifest = {"step": checkpoint.step, "sha256": hashes, "state": checkpoint.state}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2))
    kept = [path for path in checkpoints(folder) if path <= final][-keep_last:]
    _discard(path for path in checkpoints(folder) if path not in kept)


def _discard(paths: Iterable[Path]) -> None:
    """Remove folders, each under another name first, so that a kill leaves no half checkpoint under a whole one's.

    What cannot be removed now (someone reads it over a network file system) is tried again at the next checkpoint.
    """
    for path in list(paths):
        with contextlib.suppress(OSError):
            if not path.name.startswith(PARTIAL):
                path = path.rename(path.with_name(f"{PARTIAL}removed-{path.name}"))
            shutil.rmtree(path, ignore_errors=True)


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
            if file_sha256(path / file_name) != expected:
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
            if not path.exists():  # a run that goes on has removed it, and has a newer one
                return load_latest(folder)
            faults.append(str(error))
            continue
        for fault in faults:
            warnings.warn(f"{fault}; going back to {path.name}", stacklevel=2)
        return checkpoint
    if found:
        raise CheckpointError(f"no checkpoint in {folder} is whole: {'; '.join(faults)}. Start a new run")
    return None


def pick_checkpoint(folder: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of `step`; None: the newest that is whole.

    Raises:
        CheckpointError: there is none, none of this step, or it is damaged.
    """
    found = checkpoints(folder)
    if step is not None and found and folder / f"step-{step:08d}" not in found:
        steps = ", ".join(str(int(path.name.removeprefix("step-"))) for path in found)
        raise CheckpointError(f"{folder} holds no checkpoint of step {step}; kept are: {steps}")
    checkpoint = load_latest(folder) if step is None else load_checkpoint(folder / f"step-{step:08d}")
    if checkpoint is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet; train the run further")
    return checkpoint
