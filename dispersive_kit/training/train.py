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
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from dispersive_kit.data.files import atomic_write, writing
from dispersive_kit.diffusion.objectives import Objective
from dispersive_kit.errors import CheckpointError, DispersiveError, KitError
from dispersive_kit.training.batches import Batch, open_source
from dispersive_kit.training.checkpoint import Checkpoint, load_latest, save_checkpoint
from dispersive_kit.training.config import TrainConfig
from dispersive_kit.training.parallel import StopRequest, make_accelerator, require_agreement
from dispersive_kit.training.runs import (
    OBJECTIVES,
    attach_regularizer,
    build_model,
    claim_run_folder,
    draw_preview,
    run_card,
)

LOOK_EVERY = 10  # steps at most until NaN or a signal is noticed on an accelerator, where a look costs a wait
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
    run = Session(config, Path(run_dir), resume=resume)
    on_cpu = run.accelerator.device.type == "cpu"
    broken_at = torch.zeros((), dtype=torch.long, device=run.accelerator.device)  # first step that was not finite
    with run.held, StopRequest() as stop:
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
                stops = stop.asked(run.accelerator)
            if last or (step + 1) % config.eval_every == 0:
                values |= _held_out_loss(run.ema.model, run.objective, run.frozen)
                logs = True
            record = StepRecord(step + 1, config.steps, run.reduce(values) if logs else {})
            if logs:
                run.log(step + 1, record.values)
            if saves or stops:
                run.save(step + 1)
            yield record
            if stops:
                stop.end_run()


def _update(run: "Session", step: int, *, measure: bool) -> dict[str, Any]:
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
            measured["gradient_ratio"] = ratio(1 / config.accumulation)
        values = {name: values.get(name, 0) + value / config.accumulation for name, value in measured.items()}
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    values["grad_norm"] = accelerator.clip_grad_norm_(run.network.parameters(), config.grad_clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.ema.update(run.model)
    return values


def _losses(
    run: "Session", rows: Batch, step: int, *, measure: bool
) -> tuple[Tensor, dict[str, Any], Callable[[float], Tensor] | None]:
    """The loss of one micro-batch, and what is logged of it; the base arm only measures dispersion."""
    added = run.config.regularizer.added
    if not (added or (measure and run.dispersion_batch > 1)):  # a batch of one has no pairs to measure
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
        ratio = _gradient_ratio(dispersive, taps, added=added)
    return (loss + dispersive if added else loss), values, ratio


def _gradient_ratio(dispersive: Tensor, taps: list[Tensor], *, added: bool) -> Callable[[float], Tensor]:
    """|d dispersive / dz| over |d loss / dz| at the tapped activations z: how hard the regulariser pulls.

    The backward pass of the training goes through z anyway, where a hook sees the gradient of all that is trained on;
    that of `dispersive` alone is short, and taken before. So measuring costs no second pass through the network.
    `dispersive` is weighted, as it enters the total; with a weight of zero, now or by its schedule, it is a constant.

    Returns:
        To be called once `share` times the total was sent backward: gives the ratio (0-d).
    """
    if not dispersive.requires_grad:
        return lambda share: torch.zeros_like(dispersive)
    pull = torch.autograd.grad(dispersive, taps, retain_graph=True)
    total: dict[int, Tensor] = {}
    for i, z in enumerate(taps):
        z.register_hook(partial(total.__setitem__, i))

    def after_backward(share: float) -> Tensor:
        push = [total[i] / share - (own if added else 0) for i, own in enumerate(pull)]
        pull_norm, push_norm = (torch.stack([g.norm() for g in part]).norm() for part in (pull, push))
        return pull_norm / push_norm

    return after_backward


def _held_out_loss(model: nn.Module, objective: Objective, frozen: Batch, bins: int = 4) -> dict[str, Tensor]:
    """Denoising loss on the frozen held-out batch: the mean, and the mean within `bins` equal parts of t.

    A part of t that a small batch leaves empty is left out.
    """
    with torch.no_grad():
        _, aux = objective(model, frozen.x0, frozen.y, draws=frozen.draws)
    part = (aux.t * bins).long().clamp(max=bins - 1)
    by_bin = {f"held_out_t{i}": aux.per_sample[part == i].mean() for i in range(bins) if (part == i).any()}
    return {"held_out": aux.per_sample.mean(), **by_bin}


def _require_finite(broken_at: Tensor, run: "Session") -> None:
    if step := int(broken_at):
        raise KitError(
            f"the gradient became NaN or infinite at step {step}. {run.post_mortem(step)}. Taken up again it would "
            "come to the same step: start a run with a lower learning rate, or a lower weight of the regulariser"
        )


# ---- what the loop holds, and how it starts, saves and resumes


class EMA:
    """A copy of the model whose parameters follow it slowly.

    With w the average and p the parameters, w <- d w + (1 - d) p, where d = min(decay, (1 + n) / (10 + n)) at the
    n-th update: without that ramp a short run would average in its own initialisation.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


class Session:
    """One process's part of a run, started, or taken up at its newest whole checkpoint; see `train` for the errors."""

    def __init__(self, config: TrainConfig, run_dir: Path, *, resume: bool) -> None:
        self.config, self.run_dir = config, run_dir
        self.objective: Objective = OBJECTIVES[config.objective][0]()
        with contextlib.ExitStack() as held:  # is let go at once if the run cannot start
            accelerator = make_accelerator(config.precision, tensorboard=run_dir if config.tensorboard else None)
            self.accelerator, self.source = accelerator, open_source(config, accelerator.device)
            self.model = build_model(config, self.source.card).to(accelerator.device)
            self.ema, self.regularizer = EMA(self.model, config.ema_decay), attach_regularizer(self.model, config)
            held.callback(self.regularizer.remove)
            card = run_card(config, accelerator, self.source.card, self.model)
            self.dispersion_batch: int = card["dispersion_batch"]  # images that see each other
            if accelerator.is_main_process:
                self.source.verify()
                held.enter_context(claim_run_folder(run_dir, config, card, resume=resume))
            accelerator.wait_for_everyone()
            latest = self._load_weights(resume=resume)
            self.done = latest.step if latest else 0  # steps already taken
            for block in self.model.blocks if config.compile_blocks else ():
                block.compile()
            self.network = accelerator.prepare_model(self.model)  # as it is called in training
            optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.0, fused=True)
            if latest:
                moments = _nested(latest.groups["optimizer"])
                optimizer.load_state_dict({"state": moments, "param_groups": latest.state["param_groups"]})
            self.optimizer = accelerator.prepare_optimizer(optimizer)
            if accelerator.is_main_process:
                _forget_metrics_after(run_dir / "metrics.jsonl", self.done)
            accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": self.done + 1}})
            for tracker in accelerator.trackers:
                held.callback(tracker.finish)
            self.frozen = self.source.held_out.frozen_batch(self.objective)
            self.held = held.pop_all()  # what is let go at the end: hooks, files, the folder

    def _load_weights(self, *, resume: bool) -> Checkpoint | None:
        """The checkpoint that all processes go on from, with its weights in the model and its average."""
        latest = load_latest(self.run_dir / "checkpoints") if resume else None
        done = latest.step if latest else 0
        require_agreement("step at which they resume (is the run folder one that all machines share?)", done)
        require_agreement("data", self.source.card["sha256"])
        if latest:
            self.model.load_state_dict(latest.groups["model"])
            self.ema.model.load_state_dict(latest.groups["ema"])
            self.ema.updates = latest.state["ema_updates"]
        return latest

    @property
    def returned_taps(self) -> tuple[int, ...]:
        """Blocks whose features the model must return itself: a hook cannot see through MeanFlow's derivative."""
        if self.config.objective != "meanflow":
            return ()
        return tuple(int(path.removeprefix("blocks.")) for path in self.regularizer.paths)

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
        return {k: float(self.accelerator.reduce(v, "mean")) for k, v in tensors.items()}

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl, and to TensorBoard's files if there are any.

        What is not finite has no JSON; it is left out: the gradient ratio of a network whose output is still zero.
        """
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        file = self.run_dir / "metrics.jsonl"
        if self.accelerator.is_main_process:
            with writing(file, CheckpointError), file.open("a") as lines:
                lines.write(json.dumps({"step": step, **finite}) + "\n")
        self.accelerator.log(finite, step=step)

    def save(self, step: int) -> None:
        """Write the checkpoint after `step` steps, then a preview.

        No process goes on before it is on the disk: the first that ended would have the others ended too.
        """
        if self.accelerator.is_main_process:
            moments = self.optimizer.state_dict()
            groups = {"model": self.model.state_dict(), "ema": self.ema.model.state_dict()}
            groups["optimizer"] = {f"{i}.{k}": v for i, own in moments["state"].items() for k, v in own.items()}
            state = {"param_groups": moments["param_groups"], "ema_updates": self.ema.updates}
            folder = self.run_dir / "checkpoints"
            save_checkpoint(folder, Checkpoint(step, groups, state), keep_last=self.config.keep_last)
            if n := self.config.preview_images:
                file = self.run_dir / "previews" / f"step-{step:08d}"
                draw_preview(self.ema.model, n, objective=self.config.objective, file=file)
        self.accelerator.wait_for_everyone()

    def post_mortem(self, step: int) -> str:
        """Write what step `step` (counted from 1) was fed, and say where that and the last good weights are.

        Any process may be the first to fall, and each can draw the whole batch.
        """
        batch, file = self.batch(step - 1), self.run_dir / f"fed-at-step-{step:08d}.safetensors"
        fed = {"x0": batch.x0, "y": batch.y, **vars(batch.draws)}
        try:
            with atomic_write(file, CheckpointError) as unfinished:
                save_file({k: v.contiguous() for k, v in fed.items() if v is not None}, unfinished)
            kept = f"What it was fed is in {file}"
        except CheckpointError as error:  # the fault that is reported must not be hidden by this one
            kept = f"What it was fed could not be kept ({error})"
        return f"{kept}; the newest checkpoint in {self.run_dir / 'checkpoints'} is from before"


def _nested(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The state of an optimizer from names such as "3.exp_avg"."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return state


def _forget_metrics_after(file: Path, step: int) -> None:
    """A killed run may have logged steps past its last checkpoint; they will be taken, and logged, again."""
    if file.exists():
        lines = []
        for line in file.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last line of a killed run may be cut
                if json.loads(line)["step"] <= step:
                    lines.append(line)
        with atomic_write(file, CheckpointError) as unfinished:
            unfinished.write_text("".join(f"{line}\n" for line in lines))


def progress(records: Iterable[StepRecord], label: str = "") -> Iterator[StepRecord]:
    """Pass step records through and show how far they have come: a bar on a terminal, one line a tenth elsewhere.

    Of several processes the first one does. (A bar that is saved, as in a notebook, freezes at 0 %.)
    """
    if os.environ.get("RANK", "0") != "0":
        yield from records
        return
    bar, shown, tenths, first, start = None, "", -1, 0, time.monotonic()
    for record in records:
        if record.values:
            shown = "  ".join(f"{k} {record.values[k]:.3f}" for k in ("loss", "held_out") if k in record.values)
            if torch.cuda.is_available():
                shown += f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        first = first or record.step
        if sys.stderr.isatty():
            bar = bar or tqdm(total=record.steps, initial=first - 1, desc=label, unit="step", dynamic_ncols=True)
            bar.set_postfix_str(shown, refresh=False)
            bar.update()
        elif record.step * 10 // record.steps > tenths:
            tenths = record.step * 10 // record.steps
            rate = (record.step - first + 1) / max(time.monotonic() - start, 1e-9)
            left = timedelta(seconds=round((record.steps - record.step) / rate))
            line = f"{label} step {record.step}/{record.steps}  {shown}  {rate:.1f} step/s  {left} left"
            print(line.strip(), flush=True)
        yield record
    if bar:
        bar.close()
