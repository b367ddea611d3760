"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a lost run.

A checkpoint is a folder `checkpoints/step-00000500/` of safetensors files and a `manifest.json` with the small state
and the sha256 of each file. It is written under another name, flushed to disk and then renamed, and verified as it is
read. Nothing is pickled.
"""

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


@dataclass(frozen=True)
class Checkpoint:
    """Step count after which it was taken, named groups of tensors, and JSON state."""

    step: int
    groups: dict[str, dict[str, Tensor]]
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
    """What cannot be removed now (someone reads it over a network file system) is tried again next time."""
    for path in paths:
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


def load_latest(folder: Path, step: int | None = None) -> Checkpoint:
    """The newest checkpoint that is whole, or that of `step`. A damaged newer one is reported.

    Raises:
        CheckpointError: there is none, none of this step, or every one is damaged.
    """
    found, faults = checkpoints(folder), []
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint yet; train the run further")
    steps = {int(path.name.removeprefix("step-")): path for path in found}
    if step is not None and step not in steps:
        kept = ", ".join(map(str, steps))
        raise CheckpointError(f"{folder} holds no checkpoint of step {step}; kept are: {kept}")
    for path in reversed(found) if step is None else [steps[step]]:
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            if not path.exists():  # a run that goes on has removed it, and has a newer one
                return load_latest(folder, step)
            faults.append(str(error))
            continue
        for fault in faults:
            warnings.warn(f"{fault}; going back to {path.name}", stacklevel=2)
        return checkpoint
    raise CheckpointError(f"no checkpoint in {folder} is whole: {'; '.join(faults)}. Start a new run")
