"""The training loop: a generator of step records.

    for record in train(config, "runs/mine"):
        ...                       # draw a live curve, stop when you like; a checkpoint is always at hand

Each step draws its batch from (seed, step), adds Dispersive Loss if the configuration asks for it, and yields.
Nothing is read back from the device but at the steps that are logged, and every tenth to see that all is well.

On several processes each one runs this same loop: `accelerate launch --multi_gpu --num_processes 8 -m
dispersive_kit.cli train ...` (its --multi_gpu is right without a GPU too), torchrun, or, from a notebook that has
trained nothing yet, `accelerate.notebook_launcher(function, arguments, num_processes=8)` of a function that loops.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dispersive_kit.errors import DispersiveError, KitError
from dispersive_kit.training.config import TrainConfig
from dispersive_kit.training.draws import Batch
from dispersive_kit.training.interrupt import StopRequest
from dispersive_kit.training.measures import GradientRatio, held_out_loss
from dispersive_kit.training.parallel import any_process, whole
from dispersive_kit.training.session import Session, begin

LOOK_EVERY = (
    10  # steps at most until NaN or a signal is noticed on an accelerator, where a look costs a synchronisation
)
LOGGED_STATS = ("floor", "gap", "off_diagonal_mass", "feature_rms", "effective_rank", "batch_size")


@dataclass(frozen=True)
class StepRecord:
    """One step: its number counted from 1, and what was measured. `values` is empty between logged steps."""

    step: int
    steps: int
    values: dict[str, float] = field(default_factory=dict)


def train(config: TrainConfig, run_dir: str | Path, *, resume: bool = False) -> Iterator[StepRecord]:
    """Train as `config` says, in the folder `run_dir`; yields a `StepRecord` after each step.

    The folder gets config.json, run.json, metrics.jsonl and checkpoints/. With `resume`, the newest whole
    checkpoint is taken up, and the result is the same bits as that of a run that was never stopped (on a GPU: as far
    as its kernels are deterministic). Ctrl-C and SIGTERM end the run after the step in hand, with a checkpoint, on
    all processes, whichever got it.

    Raises:
        CheckpointError: the folder holds a run already, one of another configuration or data, or one that another
            process trains; a file could not be written; the processes do not see the same folder. DataError: the
            data set is missing. KitError: NaN or infinity; what the step was fed is then kept in the folder.
    """
    run = begin(config, Path(run_dir), resume=resume)
    on_cpu = run.accelerator.device.type == "cpu"
    broken_at = torch.zeros((), dtype=torch.long, device=run.accelerator.device)  # first step that was not finite
    with StopRequest() as stop, contextlib.ExitStack() as cleanup:
        cleanup.callback(run.close)
        for step in range(run.done, config.steps):
            last = step + 1 == config.steps
            logs = last or (step + 1) % config.log_every == 0
            saves = last or (step + 1) % config.checkpoint_every == 0
            try:
                values = _update(run, step, measure=logs)
            except DispersiveError as error:  # of this step, or, told late, of one before
                raise DispersiveError(f"{error}. {run.post_mortem(int(broken_at) or step + 1)}") from error
            broken_at = torch.where((broken_at == 0) & ~values["grad_norm"].isfinite(), step + 1, broken_at)
            stops = False
            if on_cpu or logs or saves or (step + 1) % LOOK_EVERY == 0:
                _require_finite(broken_at, run)
                stops = any_process(run.accelerator, bool(stop.signal_number))
            if last or (step + 1) % config.eval_every == 0:
                values |= held_out_loss(run.ema.model, run.objective, run.frozen)
                logs = True
            record = StepRecord(step + 1, config.steps, run.reduce(values) if logs else {})
            if logs:
                run.log(step + 1, record.values)
            if saves or stops:
                run.save(step + 1)
            yield record
            if stops:
                stop.end_run()


def _update(run: Session, step: int, *, measure: bool) -> dict[str, Any]:
    """One optimizer step on the global batch of `step`; returns what was measured, still on the device."""
    config, accelerator = run.config, run.accelerator
    batch, parts = run.batch(step), accelerator.num_processes * config.accumulation
    values: dict[str, Any] = {}  # means over the micro-batches
    for micro in range(config.accumulation):
        rows = batch.rows(accelerator.process_index * config.accumulation + micro, parts)
        more_to_come = micro + 1 < config.accumulation
        with accelerator.no_sync(run.network) if more_to_come else contextlib.nullcontext():
            loss, measured, ratio = _losses(run, rows, step, measure=measure)
            accelerator.backward(loss / config.accumulation)
        if ratio:
            measured["gradient_ratio"] = ratio.after_backward(1 / config.accumulation)
        values = {name: values.get(name, 0) + value / config.accumulation for name, value in measured.items()}
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    values["grad_norm"] = whole(accelerator.clip_grad_norm_(run.network.parameters(), config.grad_clip))
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.ema.update(run.model)
    return values


def _losses(
    run: Session, rows: Batch, step: int, *, measure: bool
) -> tuple[Tensor, dict[str, Any], GradientRatio | None]:
    """The loss of one micro-batch, and what is logged of it; the base arm only measures dispersion."""
    if not (run.config.regularizer.added or (measure and run.measurable)):
        with run.accelerator.autocast():
            loss, _ = run.objective(run.network, rows.x0, rows.y, draws=rows.draws)
        return loss, {"loss": loss.detach()}, None
    regularizer = run.regularizer
    with regularizer, run.accelerator.autocast():
        loss, aux = run.objective(run.network, rows.x0, rows.y, draws=rows.draws, taps=run.returned_taps)
    taps = list(aux.taps) or regularizer.captured
    dispersive = regularizer.loss(t=aux.t, y=rows.labels, step=step, taps=aux.taps or None)
    values: dict[str, Any] = {"loss": loss.detach()}
    ratio = None
    if measure:
        stats = regularizer.stats
        values |= {"dispersive": stats.loss, **{name: getattr(stats, name) for name in LOGGED_STATS}}
        # FSDP hands out returned features by a side branch, on which no denoising gradient comes back.
        if not (run.config.fsdp and run.returned_taps):
            ratio = GradientRatio(dispersive, taps, added=run.config.regularizer.added)
    return (loss + dispersive if run.config.regularizer.added else loss), values, ratio


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then constant or half a cosine down to zero."""
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    progress = step / config.steps
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0
    return config.learning_rate * warmup * decay


def _require_finite(broken_at: Tensor, run: Session) -> None:
    if step := int(broken_at):
        raise KitError(
            f"the gradient became NaN or infinite at step {step}. {run.post_mortem(step)}. Taken up again it would "
            "come to the same step: start a run with a lower learning rate, or a lower weight of the regulariser"
        )
