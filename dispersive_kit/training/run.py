"""A run folder: config.json, run.json, metrics.jsonl and checkpoints/, and the model read back from it."""

import json
from pathlib import Path
from typing import Any

import torch

from dispersive_kit.data import ImageSet
from dispersive_kit.errors import CheckpointError
from dispersive_kit.models.dit import DiT, build_dit
from dispersive_kit.training.checkpoint import Checkpoint, load_checkpoint, load_latest
from dispersive_kit.training.config import TrainConfig, differences


def claim_run_folder(run_dir: Path, config: TrainConfig, *, resume: bool) -> None:
    """Make the folder of a new run, or check that a resumed one is the same run.

    Raises:
        CheckpointError: the folder holds a run and `resume` is off, or it holds a run of another configuration.
    """
    file = run_dir / "config.json"
    if not file.exists():
        if run_dir.exists() and any(run_dir.iterdir()):
            raise CheckpointError(f"{run_dir} is not empty and holds no run; choose another folder")
        run_dir.mkdir(parents=True, exist_ok=True)
    elif not resume:
        raise CheckpointError(f"{run_dir} already holds a run: go on with --resume, or choose another folder")
    elif changed := differences(read_config(run_dir), config):
        raise CheckpointError(
            f"{run_dir} holds a run of another configuration, which cannot be resumed with this one:\n  "
            + "\n  ".join(changed)
        )
    file.write_text(config.to_json())


def read_config(run_dir: Path) -> TrainConfig:
    """The configuration of a run.

    Raises:
        CheckpointError: there is no run here, or its config.json is damaged.
    """
    try:
        return TrainConfig.from_json((run_dir / "config.json").read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{run_dir} holds no run (no config.json); train one first") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run_dir / 'config.json'} is damaged: {error}") from error


def build_model(config: TrainConfig, *, channels: int, size: int, num_classes: int) -> DiT:
    """The model at step 0: a function of the configuration alone; the caller's generators are untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_dit(
            config.model,
            input_size=size,
            in_channels=channels,
            num_classes=num_classes,
            class_dropout_prob=config.class_dropout_prob,
        )


def describe_data(data: ImageSet) -> dict[str, Any]:
    """What run.json keeps of the training set; enough to build the model again."""
    _, channels, size, _ = data.images.shape
    return {
        "name": data.name,
        "source": data.source,
        "sha256": data.sha256,
        "images": len(data),
        "channels": channels,
        "size": size,
        "classes": list(data.classes),
    }


def load_run(run_dir: str | Path, *, weights: str = "ema", step: int | None = None) -> tuple[DiT, dict[str, Any]]:
    """The trained model of a run, in eval mode, and its card (config, data, step, weights).

    Args:
        weights: "ema" (to sample from) or "model". step: a kept checkpoint; None: the newest that is whole.

    Raises:
        CheckpointError: no run, no checkpoint yet, no such step, or damaged files.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    checkpoint = pick_checkpoint(run_dir / "checkpoints", step)
    try:
        data = json.loads((run_dir / "run.json").read_text())["data"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{run_dir / 'run.json'} cannot be read: {error}") from error
    model = build_model(config, channels=data["channels"], size=data["size"], num_classes=len(data["classes"]))
    if weights not in checkpoint.groups:
        raise CheckpointError(f"{run_dir} holds {', '.join(checkpoint.groups)} weights only, not {weights!r}")
    model.load_state_dict(checkpoint.groups[weights])
    card = {"run": run_dir.name, "step": checkpoint.step, "weights": weights, "data": data, "config": config}
    return model.eval(), card


def pick_checkpoint(folder: Path, step: int | None) -> Checkpoint:
    """The checkpoint of `step`, or the newest that is whole. Raises CheckpointError: there is none."""
    checkpoint = load_latest(folder) if step is None else load_checkpoint(folder / f"step-{step:08d}")
    if checkpoint is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet; train the run further")
    return checkpoint
