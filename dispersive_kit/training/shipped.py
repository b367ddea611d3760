"""Trained runs that come with the package, and how one is made: weights in half precision, curves, and its card."""

import itertools
import json
import shutil
from pathlib import Path

import torch

from dispersive_kit.data.artefacts import FOLDER, artefact
from dispersive_kit.data.files import atomic_write
from dispersive_kit.errors import CheckpointError, ConfigError
from dispersive_kit.training.checkpoint import Checkpoint, save_checkpoint
from dispersive_kit.training.config import TrainConfig
from dispersive_kit.training.run import pick_checkpoint, read_config


def shipped_names() -> list[str]:
    """Names of the runs inside the package."""
    return sorted(p.name for p in FOLDER.iterdir() if (p / "config.json").is_file())


def shipped(name: str) -> Path:
    """The run folder of a shipped run; `load_run(shipped("digits-base"))` gives its model.

    Raises:
        ConfigError: no shipped run has this name.
        DataError: one of its files is missing or damaged.
    """
    if name not in shipped_names():
        raise ConfigError(f"no shipped run is named {name!r}; there are: {', '.join(shipped_names())}")
    return artefact(name)


def run_folder(run: str | Path) -> Path:
    """`run` itself, or the folder of the shipped run of that name where there is no such folder."""
    run = Path(run)
    return shipped(str(run)) if not run.exists() and str(run) in shipped_names() else run


def export_run(run_dir: Path, out: Path, *, step: int | None = None, command: str = "", note: str = "") -> Path:
    """Write the averaged weights of a run as float16, with its curves, previews, measurements and card, for others.

    Such a folder can be loaded, sampled and evaluated, and not trained further. Returns `out`.

    Args:
        step: a kept checkpoint; None: the newest. command, note: what the run was started with, and what a reader
            should know of it, kept in run.json.

    Raises:
        CheckpointError: no run or no such checkpoint here; `out` is not empty; it could not be written.
    """
    config = read_config(run_dir).changed(data_dir=None)  # a place on one machine
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; choose another folder")
    found = pick_checkpoint(run_dir / "checkpoints", step)
    half = {name: tensor.to(torch.float16) for name, tensor in found.groups["ema"].items()}
    with atomic_write(out, CheckpointError) as partial:
        _write_run(run_dir, partial, config, Checkpoint(found.step, {"ema": half}, {}), command=command, note=note)
    return out


def _write_run(
    run_dir: Path, out: Path, config: TrainConfig, checkpoint: Checkpoint, *, command: str, note: str
) -> None:
    save_checkpoint(out / "checkpoints", checkpoint)
    card = json.loads((run_dir / "run.json").read_text())
    card["data"]["source"] = Path(card["data"]["source"]).name
    card |= {"exported": "ema weights, float16", "command": command, "note": note}
    (out / "run.json").write_text(json.dumps(card, indent=2))
    (out / "config.json").write_text(config.to_json())
    for file in itertools.chain.from_iterable(map(run_dir.glob, ("metrics.jsonl", "previews/*", "evaluation-*.json"))):
        copied = out / file.relative_to(run_dir)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copied)
