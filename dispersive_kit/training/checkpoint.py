"""Checkpoints: with them a run survives a kill, a full disk or a flipped bit.

A checkpoint is a folder `checkpoints/step-00000500/` of safetensors files and a `manifest.json` with the small state
and the sha256 of each file. It is written under another name, flushed to disk and then renamed, and verified as it is
read. Nothing is pickled.
"""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, NonNegativeInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dispersive_kit.data.files import PARTIAL, atomic_write, file_sha256, list_folder, read_form
from dispersive_kit.errors import CheckpointError


class Checkpoint(NamedTuple):
    """Step count after which it was taken, named groups of tensors, and JSON state."""

    step: int
    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class _Manifest(BaseModel):
    step: NonNegativeInt
    sha256: dict[Annotated[str, Field(pattern=r"^\w+\.safetensors$")], str]  # file name -> its hash
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep_last: int = 2) -> None:
    """Write `folder/step-XXXXXXXX` atomically, then remove all but the newest `keep_last`, and damaged later ones.

    Raises CheckpointError: it could not be written (disk full, no permission); older checkpoints are untouched.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    for left in folder.glob(f"{PARTIAL}*"):  # by a killed process; removed first to free disk space
        shutil.rmtree(left, ignore_errors=True)
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
    for path in sorted({*checkpoints(folder)} - {*kept}):  # one that is read over a network may stay until a later save
        shutil.rmtree(path, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Raises CheckpointError: `folder` is a dead link. DataError: unreadable."""
    if folder.is_symlink() and not folder.exists():
        raise CheckpointError(f"{folder} leads to {folder.readlink()}, which cannot be reached: is its disk mounted?")
    return [path for path in list_folder(folder) if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]


def _load(path: Path) -> Checkpoint:
    try:
        manifest = read_form(path / "manifest.json", _Manifest, error=CheckpointError)
        groups = {}
        for file_name, expected in manifest.sha256.items():
            if file_sha256(path / file_name) != expected:
                raise CheckpointError(f"{path / file_name} is damaged: its sha256 is not the one in manifest.json")
            groups[file_name.removesuffix(".safetensors")] = load_file(path / file_name)
        return Checkpoint(manifest.step, groups, manifest.state)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def load_latest(folder: Path, step: int | None = None) -> Checkpoint:
    """The newest undamaged checkpoint, or that of `step`. Each damaged newer one gives a warning.

    Raises CheckpointError: there is none, none of this step, or every one is damaged.
    """
    found, faults = {int(path.name.removeprefix("step-")): path for path in checkpoints(folder)}, []
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint yet; train the run further")
    if step is not None and step not in found:
        raise CheckpointError(f"{folder} holds no checkpoint of step {step}; kept are: {', '.join(map(str, found))}")
    for path in reversed(found.values()) if step is None else [found[step]]:
        try:
            checkpoint = _load(path)
        except CheckpointError as error:
            if not path.exists():  # the run is still training: it wrote a newer one and removed this
                return load_latest(folder, step)
            faults.append(str(error))
            continue
        for fault in faults:
            warnings.warn(f"{fault}; going back to {path.name}", stacklevel=2)
        return checkpoint
    raise CheckpointError(f"no checkpoint in {folder} is whole: {'; '.join(faults)}. Start a new run")
