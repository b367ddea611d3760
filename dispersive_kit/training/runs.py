"""A run folder: config.json, run.json, metrics.jsonl and checkpoints/. How its model is loaded, sampled, exported."""

import contextlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from pydantic import BaseModel, Field, TypeAdapter
from safetensors.torch import save_file
from torch import Tensor, nn

from dispersive_kit.data import files, to_uint8
from dispersive_kit.diffusion import samplers
from dispersive_kit.diffusion.guidance import ClassifierFree
from dispersive_kit.diffusion.objectives import DDPM, FlowMatching, MeanFlow, Objective
from dispersive_kit.errors import CheckpointError, ConfigError, DataError
from dispersive_kit.models.dit import build_dit
from dispersive_kit.models.mlp import MLP
from dispersive_kit.training.checkpoint import Checkpoint, load_latest, save_checkpoint
from dispersive_kit.training.config import FREE_TO_CHANGE, TrainConfig
from dispersive_kit.training.parallel import keep_freed_memory
from dispersive_kit.training.regularizer import ENCODER_NOTE, HEAD

LEFT = (".lock", "run.json", files.PARTIAL)  # by a process that was killed before it wrote config.json
KEPT = r"metrics\.jsonl|evaluation-.*\.json"  # files that an exported run has besides its weights


@contextlib.contextmanager
def claim_run_folder(run_dir: Path, config: TrainConfig, card: dict[str, Any], *, resume: bool) -> Iterator[None]:
    """Make the folder of a new run, or check that a resumed one is the same; write config.json and run.json (`card`).

    The folder is locked until the run ends. If the process is killed, the lock is free again.
    Raises CheckpointError: the folder holds something else, or another run; another process is training in it.
    """
    exists = (run_dir / "config.json").exists()
    if exists and not resume:
        raise CheckpointError(f"{run_dir} already holds a run: go on with --resume, or choose another folder")
    if exists:
        _require_same_run(run_dir, config, card)
    elif not all(path.name.startswith(LEFT) for path in files.list_folder(run_dir)):
        raise CheckpointError(f"{run_dir} is not empty and holds no run; choose another folder")
    busy = (
        f"another process is training in {run_dir}, or a training in this process has not ended: wait until it ends, "
        "stop it (in this process: close its generator, or restart the kernel), or choose another folder"
    )
    with files.writing(run_dir, CheckpointError):
        run_dir.mkdir(parents=True, exist_ok=True)
    with files.lock(run_dir / ".lock", busy, CheckpointError):
        for name, values in (("run.json", card), ("config.json", config.model_dump())):  # last: it makes this a run
            files.write_json(run_dir / name, values, CheckpointError)
        yield


def _require_same_run(run_dir: Path, config: TrainConfig, card: dict[str, Any]) -> None:
    old, old_config = _read_card(run_dir), read_config(run_dir)
    if "exported" in old:
        raise CheckpointError(
            f"{run_dir} is an exported run, of averaged weights only: sample or evaluate it, or train in another folder"
        )
    longer = config.schedule == "constant" and config.steps >= old_config.steps
    free = {*FREE_TO_CHANGE, "data", *(["steps"] if longer else [])}
    before, now = (one.model_dump(exclude=free) for one in (old_config, config))
    for settings in (before, now):
        settings |= {f"regularizer.{name}": value for name, value in settings.pop("regularizer").items()}
    changed = [f"{name}: {before[name]!r} -> {now[name]!r}" for name in now if before[name] != now[name]]
    key = "all_sha256" if "all_sha256" in old["data"] else "sha256"  # runs of 0.1 have that of the training set alone
    if not changed and old["data"][key] != card["data"][key]:
        raise CheckpointError(
            f"{run_dir} was trained on other data: {old_config.data} from {old['data']['source']} with {key} "
            f"{old['data'][key]}, and this is {config.data} from {card['data']['source']} with {card['data'][key]}. "
            "Name the old data (--data), bring them back if they have changed, or start a new run in another folder"
        )
    # In an arm without the loss it is only measured, and no part of the objective.
    if config.regularizer.disperses and old["dispersion_batch"] != card["dispersion_batch"]:
        changed.append(f"dispersion_batch: {old['dispersion_batch']} -> {card['dispersion_batch']}")
    if listed := "\n  ".join(changed):
        raise CheckpointError(f"{run_dir} holds a run of other settings: use them, or another folder\n  {listed}")


def run_card(config: TrainConfig, accelerator: Accelerator, data: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """What run.json holds: the data, how the global batch is split, what Dispersive Loss sees of it, the machine.

    Raises ConfigError: the batch cannot be split evenly, or only into batches of one; `gather` with one process.
    """
    processes, regularizer = accelerator.num_processes, config.regularizer
    if regularizer.gather and processes == 1:
        raise ConfigError(
            "regularizer.gather needs several processes: start with `torchrun --nproc_per_node 2 -m dispersive_kit.cli`"
        )
    if config.batch_size % (parts := processes * config.accumulation):
        raise ConfigError(
            f"batch_size {config.batch_size} cannot be split over {processes} processes x {config.accumulation} "
            f"accumulation; use a multiple of {parts}"
        )
    local = config.batch_size // parts
    if local % (group := regularizer.group_size or local):
        raise ConfigError(f"the local batch of {local} cannot be split into groups of {group}: change one of the two")
    together = group * (processes if regularizer.gather else 1)
    if together < 2 and regularizer.disperses:
        raise ConfigError(
            f"the dispersion batch is {together}, and one image has no pairs to disperse: take a larger batch_size or "
            "group_size, less accumulation, or regularizer.gather over processes"
        )
    return {
        "data": data,
        **({"encoder": f"{data['name']}-{ENCODER_NOTE}"} if regularizer.preset == "repa" else {}),
        "parameters": sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and HEAD not in name),
        "global_batch": config.batch_size,
        "dispersion_batch": together,
        "dispersion_memory": regularizer.memory or 0,  # rows of earlier micro-batches beside it, at most
        "processes": processes,
        "accumulation": config.accumulation,
        "device": str(accelerator.device),
        "precision": accelerator.mixed_precision,
        "versions": files.versions(),
    }


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, without an incomplete last line. Raises CheckpointError: they cannot be read."""
    file, line = run_dir / "metrics.jsonl", TypeAdapter(dict[str, int | float])
    try:
        return [line.validate_json(text) for text in file.read_text().rpartition("\n")[0].splitlines()]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def read_config(run_dir: Path) -> TrainConfig:
    """Raises CheckpointError: there is no run here, or its config.json cannot be read."""
    file = run_dir / "config.json"
    try:
        return TrainConfig.from_json(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{run_dir} holds no run (no config.json): train one, or take a shipped one: {', '.join(shipped_names())}"
        ) from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


class _DataCard(BaseModel, extra="allow"):
    source: str
    sha256: str
    shape: Annotated[list[Annotated[int, Field(gt=0, le=1024)]], Field(min_length=1, max_length=3)]  # of a sample
    classes: list[str]


class _Card(BaseModel, extra="allow"):
    data: _DataCard
    dispersion_batch: int


def _read_card(run_dir: Path) -> dict[str, Any]:
    return files.read_form(run_dir / "run.json", _Card, error=CheckpointError).model_dump()


def shipped_names() -> list[str]:
    return [p.name for p in files.list_folder(files.ARTEFACTS) if (p / "config.json").is_file()]


def run_folder(run: str | Path) -> Path:
    """The folder `run`. If it does not exist: the folder of the shipped run of this name, if there is one."""
    run = Path(run)
    return files.artefact(str(run)) if not run.exists() and str(run) in shipped_names() else run


def build_model(config: TrainConfig, card: dict[str, Any]) -> Any:
    """The untrained model for data of this card. Raises ConfigError: unknown model, or it does not fit the data."""
    shape, num_classes = card["shape"], len(card["classes"])
    points = len(shape) == 1
    if points != (config.model == "MLP"):
        fitting = "model MLP" if points else "a DiT, for example DiT-T/2"
        raise ConfigError(f"model {config.model!r} does not take samples of shape {tuple(shape)}; use {fitting}")
    told: dict[str, Any] = {"num_classes": num_classes, "interval": config.objective == "meanflow"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if points:
            return MLP(dim=shape[0], **told)
        told |= {"class_dropout_prob": config.class_dropout_prob, "checkpointing": config.checkpointing}
        return build_dit(config.model, in_channels=shape[0], input_size=shape[1], **told)


# The training objective of each name, and its samplers; the first sampler is the default.
_SDE = {"sde": partial(samplers.euler_maruyama, churn=2.0)}  # SiT's, w = 2 sigma(t)
OBJECTIVES: dict[str, tuple[Callable[[], Objective], dict[str, Callable[..., Tensor]]]] = {
    "flow": (FlowMatching, {name: getattr(samplers, name) for name in ("heun", "euler", "dopri5")} | _SDE),
    "ddpm": (DDPM, {"ddim": samplers.ddim, "ddpm": samplers.ddpm}),
    "meanflow": (MeanFlow, {"meanflow": samplers.meanflow}),
}


def sampler_of(objective: str, name: str = "") -> tuple[str, Callable[..., Tensor]]:
    """Name and function of a sampler, by default the objective's own. Raises ConfigError: it has no such sampler."""
    _, known = OBJECTIVES[objective]
    name = name or next(iter(known))
    if name not in known:
        raise ConfigError(f"no sampler {name!r} for a model of {objective}; there are: {', '.join(known)}")
    return name, known[name]


def load_run(run: str | Path, *, weights: str = "ema", step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """The trained model of a run, in eval mode, and its card (config, data, step, weights).

    run: its folder, or the name of a shipped one, such as "digits-base". weights: "ema" (to sample from), or "model"
    (as last trained). step: a kept checkpoint; None: the newest undamaged one.
    Raises CheckpointError: no run, no checkpoint yet, no such step or weights, or damaged files.
    """
    run_dir = run_folder(run)
    config = read_config(run_dir)
    checkpoint = load_latest(run_dir / "checkpoints", step)
    data = _read_card(run_dir)["data"]
    model = build_model(config, data)
    known = [group for group in checkpoint.groups if group != "optimizer"]
    if weights not in known:
        raise CheckpointError(f"{run_dir} holds {', '.join(known) or 'no'} weights only, not {weights!r}")
    try:
        own = {key: value for key, value in checkpoint.groups[weights].items() if not key.startswith(f"{HEAD}.")}
        model.load_state_dict(own)
    except RuntimeError as error:  # names or shapes: torch says which
        raise CheckpointError(f"the weights in {run_dir} do not fit its config.json: {error}") from error
    model.null_label = model.null_label if config.class_dropout_prob else None  # an MLP's row that was never trained
    card = {"run": run_dir.absolute().name, "step": checkpoint.step, "weights": weights, "data": data, "config": config}
    return model.eval(), card


@torch.no_grad()
def sample_batch(
    model: Any,
    labels: Tensor,
    seeds: Sequence[int],
    *,
    objective: str = "flow",
    num_steps: int = 25,
    guidance: Any = None,
    sampler: str = "",
) -> Tensor:
    """Samples x0 (B, ...) on the device of labels (B,), one seed each; guidance may be None; sampler: see `sampler_of`.

    Raises DataError: a sample is not finite. ConfigError: no such sampler.
    """
    keep_freed_memory(labels.device)
    x = samplers.initial_noise(seeds, model.sample_shape).to(labels.device)
    guidance = guidance or ClassifierFree(labels, model.null_label, scale=1.0)
    x = sampler_of(objective, sampler)[1](model, x, samplers.time_grid(num_steps), guidance=guidance, seeds=seeds)
    if not bool(x.isfinite().all()):
        raise DataError(
            f"the model gives NaN or infinity among the samples with seeds {seeds[0]} to {seeds[-1]}: its training has "
            "diverged, or its weights are damaged. Take an earlier checkpoint, or train with a lower learning rate"
        )
    return x


def draw_preview(model: Any, n: int, *, objective: str, file: Path, pixels: bool) -> None:
    """n samples, classes in turn, always from the same noise: images as PNG; points and latents as safetensors."""
    labels = torch.arange(n, device=next(model.parameters()).device) % max(model.num_classes, 1)
    try:
        samples = sample_batch(model, labels, range(n), objective=objective, num_steps=20).cpu()
    except DataError as error:
        warnings.warn(f"no preview {file.name}: {error}", stacklevel=2)
        return
    with files.writing(file.parent, CheckpointError):
        file.parent.mkdir(exist_ok=True)
        if pixels and samples.ndim == 4 and samples.shape[1] in (1, 3):
            from torchvision.utils import save_image  # slow to import, and a run without pictures does not need it

            save_image(to_uint8(samples).float() / 255, file.with_suffix(".png"), nrow=8, padding=1)
        else:
            save_file({"samples": samples}, file.with_suffix(".safetensors"))


def export_run(run_dir: Path, out: Path, *, step: int | None = None) -> Path:
    """Write the averaged weights of a run as float16, with its curves, previews, measurements and card; returns `out`.

    Such a folder can be loaded, sampled and evaluated, but not trained further. step: a kept checkpoint; None: the
    newest.
    Raises CheckpointError: no run or no such checkpoint here; `out` is not empty; it could not be written.
    """
    config = read_config(run_dir := run_folder(run_dir)).changed(data_dir=None)  # a path of one machine
    if files.list_folder(out) or out.resolve() == Path.cwd():
        raise CheckpointError(f"{out} is not empty, or is the current folder; choose another folder")
    model, found = load_run(run_dir, step=step)
    half = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()}
    card = _read_card(run_dir)
    card["data"]["source"] = Path(card["data"]["source"]).name
    card["exported"] = "ema weights, float16"
    with files.atomic_write(out, CheckpointError) as unfinished:
        save_checkpoint(unfinished / "checkpoints", Checkpoint(found["step"], {"ema": half}, {}))
        files.write_json(unfinished / "run.json", card)
        files.write_json(unfinished / "config.json", config.model_dump())
        beside = [path for path in files.list_folder(run_dir) if re.fullmatch(KEPT, path.name)]
        for file in beside + files.list_folder(run_dir / "previews"):
            copied = unfinished / file.relative_to(run_dir)
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copied)
    return out
