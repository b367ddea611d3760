"""What a training loop holds: the model and its average, the optimizer, the data; how they start, save and resume."""

import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dispersive_kit.data import ImageSet, load_images
from dispersive_kit.diffusion.objectives import FlowMatching
from dispersive_kit.errors import CheckpointError
from dispersive_kit.models.dit import DiT
from dispersive_kit.regularizers.attach import Dispersive
from dispersive_kit.training.checkpoint import (
    Checkpoint,
    flatten_optimizer,
    load_latest,
    save_checkpoint,
    unflatten_optimizer,
)
from dispersive_kit.training.config import RegularizerConfig, TrainConfig
from dispersive_kit.training.draws import Batch, DeviceSet
from dispersive_kit.training.ema import EMA
from dispersive_kit.training.parallel import check_split, make_accelerator
from dispersive_kit.training.run import build_model, claim_run_folder, describe_data

HELD_OUT_IMAGES = 512  # at most, in the frozen batch of the held-out denoising loss


@dataclass
class Session:
    """One process's part of a run. `network` is `model` as prepared for several processes."""

    config: TrainConfig
    run_dir: Path
    accelerator: Accelerator
    objective: FlowMatching
    model: DiT
    network: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    regularizer: Dispersive
    train_set: DeviceSet
    frozen: Batch
    done: int  # steps already taken

    @property
    def regularised(self) -> bool:
        """Whether Dispersive Loss is added to the objective, or only measured."""
        return self.config.regularizer.preset != "none"

    def batch(self, step: int) -> Batch:
        """The global batch of a step."""
        return self.train_set.batch(
            self.objective,
            seed=self.config.seed,
            step=step,
            size=self.config.batch_size,
            null_label=self.model.null_label,
            drop_prob=self.config.class_dropout_prob,
            flip=self.config.flip,
        )

    def reduce(self, values: dict[str, Any]) -> dict[str, float]:
        """Mean over processes, read back from the device."""
        tensors = {k: torch.as_tensor(v, device=self.accelerator.device) for k, v in values.items()}
        return {k: float(self.accelerator.reduce(v, "mean")) for k, v in tensors.items()}

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        if self.accelerator.is_main_process:
            with (self.run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def save(self, step: int) -> None:
        """Write the checkpoint after `step` steps."""
        if not self.accelerator.is_main_process:
            return
        moments, groups = flatten_optimizer(self.optimizer.state_dict())
        tensors = {"model": self.model.state_dict(), "ema": self.ema.model.state_dict(), "optimizer": moments}
        state = {"param_groups": groups, "ema_updates": self.ema.updates}
        save_checkpoint(self.run_dir / "checkpoints", Checkpoint(step, tensors, state), keep_last=self.config.keep_last)


def begin(config: TrainConfig, run_dir: Path, *, resume: bool) -> Session:
    """Start a run, or take it up at its newest whole checkpoint; see `loop.train` for the errors."""
    accelerator = make_accelerator()
    device, objective = accelerator.device, FlowMatching()
    data, held_out = (
        load_images(config.data, split, data_dir=config.data_dir, size=config.image_size) for split in ("train", "test")
    )
    dispersion_batch = check_split(config.batch_size, accelerator.num_processes, config.accumulation)
    _, channels, size, _ = data.images.shape
    model = build_model(config, channels=channels, size=size, num_classes=len(data.classes)).to(device)
    ema = EMA(model, config.ema_decay)
    regularizer = attach_regularizer(model, config.regularizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    if accelerator.is_main_process:
        claim_run_folder(run_dir, config, resume=resume)
    accelerator.wait_for_everyone()
    latest = load_latest(run_dir / "checkpoints") if resume else None
    done = _restore(latest, model, ema, optimizer) if latest else 0
    if accelerator.is_main_process:
        card = {
            "data": describe_data(data),
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "dispersion_batch": dispersion_batch,
            "processes": accelerator.num_processes,
            "device": str(device),
            "versions": versions(),
        }
        (run_dir / "run.json").write_text(json.dumps(card, indent=2))
        _forget_metrics_after(run_dir / "metrics.jsonl", done)
    network, prepared = accelerator.prepare(model, optimizer)
    return Session(
        config,
        run_dir,
        accelerator,
        objective,
        model,
        network,
        ema,
        prepared,
        regularizer,
        DeviceSet.of(data, device),
        held_out_batch(held_out, objective, device=device),
        done,
    )


def attach_regularizer(model: nn.Module, config: RegularizerConfig) -> Dispersive:
    """Dispersive Loss as configured; without one, the paper's, which is then measured and not added."""
    preset = "paper" if config.preset == "none" else config.preset
    return Dispersive.from_preset(model, preset, **config.overrides())


def versions() -> dict[str, str]:
    """Versions of what a number may depend on."""
    packages = ("dispersive-kit", "torch", "torchvision", "numpy", "accelerate")
    return {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}}


def _restore(checkpoint: Checkpoint, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> int:
    groups, state = checkpoint.groups, checkpoint.state
    if missing := {"model", "ema", "optimizer"} - set(groups):
        raise CheckpointError(
            f"this is an exported run: it holds no {', '.join(sorted(missing))} and cannot be trained further. "
            "Sample or evaluate it, or start a new run in another folder"
        )
    model.load_state_dict(groups["model"])
    ema.model.load_state_dict(groups["ema"])
    ema.updates = state["ema_updates"]
    optimizer.load_state_dict(unflatten_optimizer(groups["optimizer"], state["param_groups"]))
    return checkpoint.step


def _forget_metrics_after(file: Path, step: int) -> None:
    """A killed run may have logged steps past its last checkpoint; they will be taken, and logged, again."""
    if file.exists():
        lines = [line for line in file.read_text().splitlines() if _logged_step(line) <= step]
        file.write_text("".join(f"{line}\n" for line in lines))


def _logged_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the last line of a killed run may be cut
        return float("inf")


def held_out_batch(
    held_out: ImageSet,
    objective: FlowMatching,
    *,
    size: int = HELD_OUT_IMAGES,
    device: torch.device | str = "cpu",
) -> Batch:
    """At most `size` held-out images with their t and eps: the same for every run, arm and step."""
    size = min(size, len(held_out))
    return DeviceSet.of(held_out, device).batch(objective, seed=0, step=0, size=size, null_label=None, drop_prob=0.0)


def held_out_loss(model: nn.Module, objective: FlowMatching, frozen: Batch, bins: int = 4) -> dict[str, Tensor]:
    """Denoising loss on the frozen held-out batch: the mean, and the mean within `bins` equal parts of t."""
    with torch.no_grad():
        _, aux = objective(model, frozen.x0, frozen.y, draws=frozen.draws)
    part = (aux.t * bins).long().clamp(max=bins - 1)
    by_bin = {f"held_out_t{i}": aux.per_sample[part == i].mean() for i in range(bins)}
    return {"held_out": aux.per_sample.mean(), **by_bin}
