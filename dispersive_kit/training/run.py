"""A run folder: config.json, run.json, metrics.jsonl and checkpoints/, and the model read back from it."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from dispersive_kit.data.files import PARTIAL, atomic_write, lock, read_json, writing
from dispersive_kit.diffusion.objectives import DDPM, FlowMatching, MeanFlow, Objective
from dispersive_kit.errors import CheckpointError, ConfigError
from dispersive_kit.models.dit import build_dit
from dispersive_kit.models.mlp import MLP
from dispersive_kit.training.checkpoint import (
    Checkpoint,
    checkpoints,
    load_checkpoint,
    load_latest,
)
from dispersive_kit.training.config import TrainConfig, differences

LOCK = ".lock"


def claim_run_folder(run_dir: Path, config: TrainConfig, card: dict[str, Any], *, resume: bool) -> contextlib.ExitStack:
    """Make the folder of a new run, or check that a resumed one is the same run; write config.json and run.json.

    card: what goes into run.json. Returns the lock on the folder, to be closed at the end; a killed process's is freed.

    Raises:
        CheckpointError: the folder holds a run and `resume` is off; a run of another configuration, other data or
            another dispersion batch; an exported run; or a run that another process is training.
    """
    exists = (run_dir / "config.json").exists()
    if exists and not resume:
        raise CheckpointError(f"{run_dir} already holds a run: go on with --resume, or choose another folder")
    if not exists and run_dir.exists() and any(not _left_by_a_start(path) for path in run_dir.iterdir()):
        raise CheckpointError(f"{run_dir} is not empty and holds no run; choose another folder")
    if exists:
        _require_same_run(run_dir, config, card)
    held = contextlib.ExitStack()
    busy = (
        f"another process is training in {run_dir}, or a training in this one was not ended: wait for its end, stop it "
        "(here: close its generator, or restart the kernel), or choose another folder"
    )
    with writing(run_dir, CheckpointError):
        run_dir.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(run_dir / LOCK, busy, CheckpointError))
    # config.json is what makes it a run, so it comes last.
    for name, text in (("run.json", json.dumps(card, indent=2)), ("config.json", config.to_json())):
        with atomic_write(run_dir / name, CheckpointError) as partial:
            partial.write_text(text)
    return held


def _left_by_a_start(path: Path) -> bool:
    """What a process leaves that was killed before it had made a run of the folder."""
    return path.name in (LOCK, "run.json") or path.name.startswith(PARTIAL)


def _require_same_run(run_dir: Path, config: TrainConfig, card: dict[str, Any]) -> None:
    changed = differences(read_config(run_dir), config)
    old = read_json(run_dir / "run.json", default={})  # it will be written again
    if "exported" in old:
        raise CheckpointError(
            f"{run_dir} is an exported run: it holds averaged weights only and cannot be trained further. "
            "Sample or evaluate it, or start a new run in another folder"
        )
    before, now = (one.get("data", {}).get("sha256") for one in (old, card))
    if old and before != now and not changed:
        raise CheckpointError(
            f"{run_dir} was trained on other data: {card['data']['source']} is not what it began with (sha256 {before} "
            f"then, {now} now). Bring the old data back, or start a new run in another folder"
        )
    # In an arm without the loss it is only measured, and no part of the objective.
    if old and config.regularizer.added and old["dispersion_batch"] != card["dispersion_batch"]:
        changed.append(f"dispersion_batch: {old['dispersion_batch']} -> {card['dispersion_batch']}")
    if changed:
        raise CheckpointError(
            f"{run_dir} holds a run of another configuration, which cannot be resumed with this one:\n  "
            + "\n  ".join(changed)
        )


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


def build_model(config: TrainConfig, card: dict[str, Any]) -> Any:
    """The model at step 0 for data of this card (shape, classes); the caller's generators are untouched.

    Raises:
        ConfigError: no such model, or one that does not fit the data.
    """
    shape, num_classes = card["shape"], len(card["classes"])
    points = len(shape) == 1
    if points != (config.model == "MLP"):
        fitting = "model MLP" if points else "a DiT, for example DiT-T/2"
        raise ConfigError(f"model {config.model!r} does not take samples of shape {tuple(shape)}; use {fitting}")
    interval = config.objective == "meanflow"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if points:
            return MLP(dim=shape[0], num_classes=num_classes, interval=interval)
        return build_dit(
            config.model,
            input_size=shape[1],
            in_channels=shape[0],
            num_classes=num_classes,
            class_dropout_prob=config.class_dropout_prob,
            interval=interval,
            checkpointing=config.checkpointing,
        )


def build_objective(config: TrainConfig) -> Objective:
    """The training objective of a configuration."""
    return {"flow": FlowMatching, "ddpm": DDPM, "meanflow": MeanFlow}[config.objective]()


def load_run(run_dir: str | Path, *, weights: str = "ema", step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """The trained model of a run, in eval mode, and its card (config, data, step, weights).

    Args:
        weights: "ema" (to sample from), or "model" (as last trained).
        step: a kept checkpoint; None: the newest that is whole.

    Raises:
        CheckpointError: no run, no checkpoint yet, no such step or weights, or damaged files.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    checkpoint = pick_checkpoint(run_dir / "checkpoints", step)
    try:
        data = json.loads((run_dir / "run.json").read_text())["data"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{run_dir / 'run.json'} cannot be read: {error}") from error
    model = build_model(config, data)
    known = [group for group in checkpoint.groups if group != "optimizer"]
    if weights not in known:
        raise CheckpointError(f"{run_dir} holds {', '.join(known)} weights only, not {weights!r}")
    model.load_state_dict(checkpoint.groups[weights])
    card = {"run": run_dir.name, "step": checkpoint.step, "weights": weights, "data": data, "config": config}
    return model.eval(), card


def pick_checkpoint(folder: Path, step: int | None) -> Checkpoint:
    """The checkpoint of `step`, or the newest that is whole. Raises CheckpointError: there is none."""
    if step is not None and (kept := checkpoints(folder)) and folder / f"step-{step:08d}" not in kept:
        steps = ", ".join(str(int(path.name.removeprefix("step-"))) for path in kept)
        raise CheckpointError(f"{folder} holds no checkpoint of step {step}; kept are: {steps}")
    checkpoint = load_latest(folder) if step is None else load_checkpoint(folder / f"step-{step:08d}")
    if checkpoint is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet; train the run further")
    return checkpoint
