"""The training loop: a generator of step records."""

import contextlib
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from dispersive_kit.data.files import atomic_write, writing
from dispersive_kit.diffusion.objectives import Objective
from dispersive_kit.errors import CheckpointError, DispersiveError, KitError
from dispersive_kit.regularizers import Dispersive, depth_use
from dispersive_kit.training import runs
from dispersive_kit.training.batches import Batch, LatentSet, open_source
from dispersive_kit.training.checkpoint import Checkpoint, checkpoints, load_latest, save_checkpoint
from dispersive_kit.training.config import TrainConfig
from dispersive_kit.training.parallel import StopRequest, make_accelerator
from dispersive_kit.training.regularizer import attach_regularizer

LOOK_EVERY = 10  # steps between checks for NaN and signals on an accelerator: each check waits for it
LINE = "{desc}step {n}/{total}{postfix}  {rate_fmt}  {remaining} left"  # of the progress, where there is no terminal
LOGGED_STATS = ("floor", "gap", "off_diagonal_mass", "feature_rms", "effective_rank", "batch_size")


class StepRecord(NamedTuple):
    """`step` is counted from 1; `values`, what was measured, is empty between logged steps."""

    step: int
    steps: int
    values: dict[str, float]


def train(config: TrainConfig, run_dir: str | Path, *, resume: bool = False) -> Iterator[StepRecord]:
    """Train as `config` says, in the folder `run_dir`; yields a `StepRecord` after each step.

    On several processes each one runs this loop, started by `accelerate launch --multi_gpu` or torchrun, or, in a
    notebook that has trained nothing yet, by `accelerate.notebook_launcher(function, arguments, num_processes=8)`.

    With `resume`, training continues from the newest undamaged checkpoint. The result is the same, to the bit, as that
    of a run that was never stopped (on a GPU: if its kernels are deterministic). Ctrl-C and SIGTERM, to any of the
    processes, end the run after the current step, with a checkpoint.
    Raises CheckpointError: the folder holds another run; a file could not be written; the processes do not see the same
        folder. DataError: the data set is missing. KitError: NaN or infinity.
    """
    run = Session(config, Path(run_dir), resume=resume)
    last_good = (
        f"The newest checkpoint in {run.folder}, if any, is from an earlier step. Resumed, the run would fail again: "
        "start a run with a lower learning rate, or a lower weight of the regulariser"
    )
    on_cpu = run.accelerator.device.type == "cpu"
    broken_at = torch.zeros((), dtype=torch.long, device=run.accelerator.device)  # first step that was not finite
    with run.held, StopRequest() as stop:
        for step in range(run.done, config.steps):
            last = step + 1 == config.steps
            logs = last or (step + 1) % config.log_every == 0
            saves = last or (step + 1) % config.checkpoint_every == 0
            try:
                values = _update(run, step, measure=logs)
            except DispersiveError as error:  # of this step, or of an earlier one and noticed only now
                raise DispersiveError(f"step {int(broken_at) or step + 1}: {error}. {last_good}") from error
            broken_at = torch.where((broken_at == 0) & ~values["grad_norm"].isfinite(), step + 1, broken_at)
            stops = False
            if on_cpu or logs or saves or (step + 1) % LOOK_EVERY == 0:
                if int(broken_at):
                    raise KitError(f"the gradient became NaN or infinite at step {int(broken_at)}. {last_good}")
                stops = stop.asked(run.accelerator)
            if last or (step + 1) % config.eval_every == 0:
                values |= _held_out_loss(run.ema.model, run.objective, run.frozen)
                if run.validation:
                    values["validation"] = _held_out_loss(run.ema.model, run.objective, run.validation)["held_out"]
                logs = True
            if logs:
                values |= _depth_use(run.ema.model, run.objective, run.frozen)
            record = StepRecord(step + 1, config.steps, run.log(step + 1, values) if logs else {})
            if saves or stops:
                run.save(step + 1)
            yield record
            if stops or (last and stop.signal_number is not None):  # one that came after the last look is not lost
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
    """The loss of one micro-batch and its logged values. In the base arm, dispersion is only measured."""
    regularizer, added = run.regularizer, run.config.regularizer.added
    looks = added or (measure and run.dispersion_batch > 1)  # a batch of one has no pairs to measure
    with regularizer if looks else contextlib.nullcontext(), run.accelerator.autocast():
        given = {"draws": rows.draws, "taps": run.returned_taps if looks else ()}
        loss, aux = run.objective(run.network, rows.x0, rows.y, **given)
    values: dict[str, Any] = {"loss": loss.detach()}
    if not looks:
        return loss, values, None
    taps = list(aux.taps) or regularizer.captured
    dispersive = regularizer.loss(x0=rows.x0, t=aux.t, y=rows.condition, step=step, taps=aux.taps or None)
    total = loss + dispersive if added else loss
    if not measure:
        return total, values, None
    if isinstance(regularizer, Dispersive):
        stats = regularizer.stats
        values |= {"dispersive": stats.loss, **{name: getattr(stats, name) for name in LOGGED_STATS}}
    else:  # of a rival, in place of Dispersive Loss
        values["dispersive"] = regularizer.value
    return total, values, _gradient_ratio(dispersive, taps, added=added)


def _gradient_ratio(dispersive: Tensor, taps: list[Tensor], *, added: bool) -> Callable[[float], Tensor]:
    """|d dispersive / dz| over |d loss / dz| at the tapped z, as a function to call after backward of `share` x total.

    A hook at z records the gradient of the total, so no second backward pass through the network is needed.
    """
    if not dispersive.requires_grad:  # its weight is zero, now or by its schedule
        return lambda share: torch.zeros_like(dispersive)
    grads = torch.autograd.grad(dispersive, taps, retain_graph=True, allow_unused=True)
    pull = {i: grad for i, grad in enumerate(grads) if grad is not None}  # LayerSync's deeper block has none
    total: dict[int, Tensor] = {}
    for i in pull:
        taps[i].register_hook(partial(total.__setitem__, i))

    def after_backward(share: float) -> Tensor:
        push = [total[i] / share - (own if added else 0) for i, own in pull.items()]
        pull_norm, push_norm = (torch.stack([g.norm() for g in part]).norm() for part in (pull.values(), push))
        return pull_norm / push_norm

    return after_backward


def _held_out_loss(model: nn.Module, objective: Objective, frozen: Batch, bins: int = 4) -> dict[str, Tensor]:
    """Denoising loss on the frozen held-out batch: the mean, and the mean within `bins` equal parts of t, if any."""
    with torch.no_grad():
        _, aux = objective(model, frozen.x0, frozen.y, draws=frozen.draws)
    part = (aux.t * bins).long().clamp(max=bins - 1)
    by_bin = {f"held_out_t{i}": aux.per_sample[part == i].mean() for i in range(bins) if (part == i).any()}
    return {"held_out": aux.per_sample.mean(), **by_bin}


def _depth_use(model: nn.Module, objective: Objective, frozen: Batch, size: int = 64) -> dict[str, Tensor]:
    """Depth use of the averaged model, over the first `size` held-out samples at their own times."""
    x0, y, draws = frozen.x0[:size], frozen.y[:size], frozen.draws[:size]
    with torch.no_grad(), depth_use(model) as use:
        model(objective.path.x_t(x0, draws.eps, draws.t).to(x0.dtype), draws.t, y)
    return {f"depth_use_{i}": value for i, value in enumerate(use.values())}


# ---- the state of the loop: how it starts, saves and resumes


class EMA:
    """Exponential moving average of the model's parameters p, as a second model: w <- d w + (1 - d) p.

    d = min(decay, (1 + n) / (10 + n)) after n updates: `decay` alone would keep the initial weights in short runs.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages: list[Any] = list(self.model.parameters())
        followed: list[Any] = list(model.parameters())[: len(averages)]  # without a rival's head, which comes last
        torch._foreach_lerp_(averages, followed, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


class Session:
    """One process's part of a run: new, or resumed at its newest undamaged checkpoint; see `train` for the errors."""

    def __init__(self, config: TrainConfig, run_dir: Path, *, resume: bool) -> None:
        self.config, self.run_dir = config, run_dir
        folder = self.folder = run_dir / "checkpoints"
        self.objective: Objective = runs.OBJECTIVES[config.objective][0]()
        with contextlib.ExitStack() as held:  # released at once if the run cannot start
            accelerator = make_accelerator(config.precision)
            self.accelerator, self.source = accelerator, open_source(config, accelerator.device)
            self.model = runs.build_model(config, self.source.card).to(accelerator.device)
            self.ema = EMA(self.model, config.ema_decay)
            self.regularizer = attach_regularizer(self.model, config, self.source.train)
            held.callback(self.regularizer.remove)
            # The model returns these features itself: a hook cannot see through MeanFlow's derivative.
            paths = self.regularizer.paths if config.objective == "meanflow" else []
            self.returned_taps = tuple(int(path.removeprefix("blocks.")) for path in paths)
            card = runs.run_card(config, accelerator, self.source.card, self.model)
            self.dispersion_batch: int = card["dispersion_batch"]  # images that are compared with each other
            if accelerator.is_main_process:
                if isinstance(self.source.train, LatentSet):
                    self.source.train.verify()
                held.enter_context(runs.claim_run_folder(run_dir, config, card, resume=resume))
            accelerator.wait_for_everyone()
            latest = load_latest(folder) if resume and checkpoints(folder) else None
            self.done = latest.step if latest else 0  # steps already taken
            seen = gather_object([(self.done, self.source.card["all_sha256"])])
            if any(one != seen[0] for one in seen):
                raise CheckpointError(
                    f"the processes do not agree on the step and the data of {run_dir}: {seen}, by rank. Do all "
                    "machines share this folder?"
                )
            how: dict[str, Any] = {"betas": config.betas, "weight_decay": config.weight_decay}
            optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **how)
            if latest:
                try:
                    self._restore(latest, optimizer)
                except (KeyError, TypeError, ValueError, RuntimeError) as error:
                    raise CheckpointError(f"step {latest.step} in {folder} does not fit this run: {error!r}") from error
            for block in self.model.blocks if config.compile_blocks else ():
                block.compile()
            self.network = accelerator.prepare_model(self.model)  # as it is called in training
            self.optimizer = accelerator.prepare_optimizer(optimizer)
            if accelerator.is_main_process:
                _forget_metrics_after(run_dir / "metrics.jsonl", self.done)
            self.frozen = self.source.held_out.frozen_batch(self.objective)
            left_out = self.source.validation
            self.validation = left_out.frozen_batch(self.objective) if left_out else None
            self.held = held.pop_all()  # released at the end: hooks and the lock of the folder

    def _restore(self, latest: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
        self.model.load_state_dict(latest.groups["model"])
        self.ema.model.load_state_dict(latest.groups["ema"])
        self.ema.updates = latest.state["ema_updates"]
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in latest.groups["optimizer"].items():  # such as 3.exp_avg
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": moments, "param_groups": latest.state["param_groups"]})

    def batch(self, step: int) -> Batch:
        config, label = self.config, self.model.null_label
        drawn: dict[str, Any] = {"seed": config.seed, "step": step, "size": config.batch_size, "flip": config.flip}
        return self.source.train.batch(self.objective, **drawn, null_label=label, drop_prob=config.class_dropout_prob)

    def log(self, step: int, values: dict[str, Any]) -> dict[str, float]:
        """Means over processes, read back from the device; the finite ones are written to metrics.jsonl."""
        tensors = {k: torch.as_tensor(v, device=self.accelerator.device) for k, v in values.items()}
        means = {k: float(self.accelerator.reduce(v, "mean")) for k, v in tensors.items()}
        file = self.run_dir / "metrics.jsonl"
        if self.accelerator.is_main_process:
            finite = {k: v for k, v in means.items() if math.isfinite(v)}  # while the output is 0 gradient_ratio is not
            with writing(file, CheckpointError), file.open("a") as lines:
                lines.write(json.dumps({"step": step, **finite}) + "\n")
        return means

    def save(self, step: int) -> None:
        """All processes wait until the checkpoint is on disk: when one of them ends, a launcher ends the others."""
        if self.accelerator.is_main_process:
            moments = self.optimizer.state_dict()
            groups = {"model": self.model.state_dict(), "ema": self.ema.model.state_dict()}
            groups["optimizer"] = {f"{i}.{k}": v for i, own in moments["state"].items() for k, v in own.items()}
            state = {"param_groups": moments["param_groups"], "ema_updates": self.ema.updates}
            save_checkpoint(self.folder, Checkpoint(step, groups, state), keep_last=self.config.keep_last)
            if n := self.config.preview_images:
                file, pixels = self.run_dir / "previews" / f"step-{step:08d}", "autoencoder" not in self.source.card
                runs.draw_preview(self.ema.model, n, objective=self.config.objective, file=file, pixels=pixels)
        self.accelerator.wait_for_everyone()


def _forget_metrics_after(file: Path, step: int) -> None:
    """Remove later lines: a killed run may have logged steps after its checkpoint, and these are logged again."""
    if file.exists():
        lines = []
        for line in file.read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a damaged line must not stop the training
                if json.loads(line)["step"] <= step:
                    lines.append(line)
        with atomic_write(file, CheckpointError) as unfinished:
            unfinished.write_bytes(b"".join(line + b"\n" for line in lines))


def progress(records: Iterable[StepRecord], label: str = "") -> Iterator[StepRecord]:
    """Yield the same records. The first process shows a bar on a terminal, else a line for each tenth of the run."""
    if os.environ.get("RANK", "0") != "0":
        yield from records
        return
    terminal, shown, tenths, bar, begun = sys.stderr.isatty(), "", -1, None, time.time()
    how: dict[str, Any] = {"dynamic_ncols": True} if terminal else {"bar_format": LINE, "delay": math.inf}
    how |= {"desc": label and f"{label}: ", "unit": " step"}
    for record in records:
        if record.values:
            shown = "  ".join(f"{k} {record.values[k]:.3f}" for k in ("loss", "held_out") if k in record.values)
            if torch.cuda.is_available():
                shown += f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        bar = bar or tqdm(total=record.steps, initial=record.step - 1, **how)
        bar.start_t = begun  # the first step took time too
        bar.set_postfix_str(shown, refresh=False)
        bar.update()
        if not terminal and record.step * 10 // record.steps > tenths:
            tenths = record.step * 10 // record.steps
            print(bar, flush=True)
        yield record
    if bar:
        bar.close()
