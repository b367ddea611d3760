"""What a training loop holds: the model and its averages, the optimizer, the data; how they start, save and resume."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from dispersive_kit.data.files import atomic_write, versions, writing
from dispersive_kit.diffusion.objectives import Objective
from dispersive_kit.errors import CheckpointError, ConfigError, DispersiveError
from dispersive_kit.regularizers.attach import Dispersive
from dispersive_kit.regularizers.baselines import NormMatched
from dispersive_kit.training.checkpoint import (
    Checkpoint,
    flatten_optimizer,
    load_latest,
    save_checkpoint,
    unflatten_optimizer,
)
from dispersive_kit.training.config import RegularizerConfig, TrainConfig
from dispersive_kit.training.draws import Batch, frozen_batch
from dispersive_kit.training.ema import EMA
from dispersive_kit.training.parallel import (
    check_processes,
    check_split,
    keep_freed_memory,
    make_accelerator,
    require_agreement,
    restore_state,
    shard,
    state_of,
    whole,
)
from dispersive_kit.training.run import build_model, build_objective, claim_run_folder
from dispersive_kit.training.sampling import preview, save_preview
from dispersive_kit.training.sources import Source, open_source


@dataclass
class Session:
    """One process's part of a run. `network` is `model` as prepared for several processes."""

    config: TrainConfig
    run_dir: Path
    accelerator: Accelerator
    objective: Objective
    model: Any
    network: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    regularizer: Dispersive
    source: Source
    frozen: Batch
    dispersion_batch: int  # images that see each other
    done: int  # steps already taken
    held: Any = None  # the lock on the folder, in the first process
    board: Any = None  # TensorBoard's writer, if asked for

    @property
    def measurable(self) -> bool:
        """Whether there are pairs to measure: a batch of one has none."""
        return self.dispersion_batch > 1

    @property
    def returned_taps(self) -> tuple[int, ...]:
        """Blocks whose features the model must return itself: a hook cannot see through MeanFlow's derivative."""
        if self.config.objective != "meanflow":
            return ()
        return tuple(int(path.removeprefix("blocks.")) for path in self.regularizer.paths)

    def close(self) -> None:
        """Leave no hook, no lock and no open file behind."""
        self.regularizer.remove()
        for opened in (self.board, self.held):
            if opened:
                opened.close()

    def batch(self, step: int) -> Batch:
        """The global batch of a step."""
        return self.source.train.batch(
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
        return {k: float(self.accelerator.reduce(whole(v), "mean")) for k, v in tensors.items()}

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl, and to TensorBoard's files if there are any.

        What is not finite has no JSON; it is left out: the gradient ratio of a network whose output is still zero.
        """
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if self.accelerator.is_main_process:
            metrics = self.run_dir / "metrics.jsonl"
            with writing(metrics, CheckpointError), metrics.open("a") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        if self.board:
            for name, value in finite.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def save(self, step: int) -> None:
        """Write the checkpoint after `step` steps, then a preview.

        No process goes on before it is on the disk: the first that ended would have the others ended too.
        """
        models = {"model": self.model, "ema": self.ema.model}
        # Under FSDP gathering is a joint act, so every process does it and the first one writes.
        tensors = {name: {k: whole(v) for k, v in m.state_dict().items()} for name, m in models.items()}
        moments, groups = flatten_optimizer(state_of(self.optimizer))
        if self.accelerator.is_main_process:
            state = {"param_groups": groups, "ema_updates": self.ema.updates}
            checkpoint = Checkpoint(step, {**tensors, "optimizer": moments}, state)
            save_checkpoint(self.run_dir / "checkpoints", checkpoint, keep_last=self.config.keep_last)
        drawn = self._preview()
        if drawn is not None and self.accelerator.is_main_process:
            with writing(self.run_dir / "previews", CheckpointError):
                save_preview(drawn, self.run_dir / "previews" / f"step-{step:08d}")
        self.accelerator.wait_for_everyone()

    def _preview(self) -> Tensor | None:
        if not self.config.preview_images or not (self.accelerator.is_main_process or self.config.fsdp):
            return None
        device = self.accelerator.device
        return preview(self.ema.model, self.config.preview_images, objective=self.config.objective, device=device)

    def post_mortem(self, step: int) -> str:
        """Write what step `step` (counted from 1) was fed, and say where that and the last good weights are.

        Any process may be the first to fall, and each can draw the whole batch.
        """
        batch, file = self.batch(step - 1), self.run_dir / f"fed-at-step-{step:08d}.safetensors"
        fed = {"x0": batch.x0, "y": batch.y, **vars(batch.draws)}
        try:
            with atomic_write(file, CheckpointError) as partial:
                save_file({k: v.contiguous() for k, v in fed.items() if v is not None}, partial)
            kept = f"What it was fed is in {file}"
        except CheckpointError as error:  # the fault that is reported must not be hidden by this one
            kept = f"What it was fed could not be kept ({error})"
        return f"{kept}; the newest checkpoint in {self.run_dir / 'checkpoints'} is from before"


def begin(config: TrainConfig, run_dir: Path, *, resume: bool) -> Session:
    """Start a run, or take it up at its newest whole checkpoint; see `loop.train` for the errors."""
    accelerator = make_accelerator(config.precision)
    check_processes(
        accelerator.num_processes, {"fsdp": config.fsdp, "regularizer.gather": bool(config.regularizer.gather)}
    )
    device, objective = accelerator.device, build_objective(config)
    keep_freed_memory(device)
    source = open_source(config, device)
    model = build_model(config, source.card).to(device)
    ema = EMA(model, config.ema_decay)
    regularizer = attach_regularizer(model, config.regularizer)
    if config.objective == "meanflow" and not all(re.fullmatch(r"blocks\.\d+", path) for path in regularizer.paths):
        raise ConfigError(
            f"regularizer.at is {', '.join(regularizer.paths)}: with MeanFlow it must be whole blocks, such as "
            "blocks.1, since the model itself returns their outputs"
        )
    card, held = run_card(config, accelerator, source, model), None
    if accelerator.is_main_process:
        source.verify()
        held = claim_run_folder(run_dir, config, card, resume=resume)
    accelerator.wait_for_everyone()
    latest = load_latest(run_dir / "checkpoints") if resume else None
    done = latest.step if latest else 0
    require_agreement("step at which they resume (is the run folder one that all machines share?)", done)
    require_agreement("data", source.card["sha256"])
    if latest:
        _restore_weights(latest, model, ema)
    if config.compile_blocks:
        for block in model.blocks:
            block.compile()
    if config.fsdp:
        for one in (model, ema.model):
            shard(one, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    if latest:
        restore_state(optimizer, unflatten_optimizer(latest.groups["optimizer"], latest.state["param_groups"]))
    if accelerator.is_main_process:
        _forget_metrics_after(run_dir / "metrics.jsonl", done)
    return Session(
        config=config,
        run_dir=run_dir,
        accelerator=accelerator,
        objective=objective,
        model=model,
        network=model if config.fsdp else accelerator.prepare_model(model),
        ema=ema,
        optimizer=accelerator.prepare_optimizer(optimizer),
        regularizer=regularizer,
        source=source,
        frozen=frozen_batch(source.held_out, objective),
        dispersion_batch=card["dispersion_batch"],
        done=done,
        held=held,
        board=_board(run_dir, done) if config.tensorboard and accelerator.is_main_process else None,
    )


def run_card(config: TrainConfig, accelerator: Accelerator, source: Source, model: nn.Module) -> dict[str, Any]:
    """What run.json holds: the data, how the global batch is split, what Dispersive Loss sees of it, and on what.

    Raises:
        ConfigError: the batch cannot be split evenly, or into batches of one, in which nothing is dispersed.
    """
    rows = check_split(config.batch_size, accelerator.num_processes, config.accumulation)
    together = rows * (accelerator.num_processes if config.regularizer.gather else 1)
    if together < 2 and config.regularizer.added:
        raise ConfigError(
            f"the local batch is {together}, and one image has no pairs to disperse: take a larger batch_size, less "
            "accumulation, or regularizer.gather over processes"
        )
    return {
        "data": source.card,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "global_batch": config.batch_size,
        "dispersion_batch": together,
        "dispersion_memory": config.regularizer.memory or 0,  # rows of earlier micro-batches beside it, at most
        "processes": accelerator.num_processes,
        "accumulation": config.accumulation,
        "device": str(accelerator.device),
        "precision": accelerator.mixed_precision,
        "versions": versions(),
    }


def attach_regularizer(model: nn.Module, config: RegularizerConfig) -> Dispersive:
    """Dispersive Loss as configured, or its placebo; without one, the paper's, which is then measured and not added.

    Raises:
        ConfigError: the model has no such block, or an option does not fit the number of processes.
    """
    preset = "paper" if config.preset == "none" else config.preset
    try:
        if config.norm_matched is not None:
            return NormMatched.from_preset(model, preset, **config.overrides(), rms=config.norm_matched)
        return Dispersive.from_preset(model, preset, **config.overrides())
    except DispersiveError as error:
        raise ConfigError(f"regularizer: {error}") from error


def _restore_weights(checkpoint: Checkpoint, model: nn.Module, ema: EMA) -> None:
    model.load_state_dict(checkpoint.groups["model"])
    ema.model.load_state_dict(checkpoint.groups["ema"])
    ema.updates = checkpoint.state["ema_updates"]


def _board(run_dir: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise CheckpointError("tensorboard is not installed: pip install 'dispersive-kit[tensorboard]'") from error
    return SummaryWriter(run_dir / "tensorboard", purge_step=done + 1)


def _forget_metrics_after(file: Path, step: int) -> None:
    """A killed run may have logged steps past its last checkpoint; they will be taken, and logged, again."""
    if file.exists():
        lines = [line for line in file.read_text().splitlines() if _logged_step(line) <= step]
        with atomic_write(file, CheckpointError) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines))


def _logged_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the last line of a killed run may be cut
        return float("inf")
