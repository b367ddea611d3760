"""What a run is: frozen dataclasses, and the presets by name."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dispersive_kit.errors import ConfigError, DispersiveError
from dispersive_kit.regularizers.options import PRESETS, LossOptions, check_number, preset_settings
from dispersive_kit.regularizers.schedules import Schedule


@dataclass(frozen=True)
class RegularizerConfig:
    """Which Dispersive Loss is added, if any. What is None is taken from the preset."""

    preset: str = "none"  # none, paper, official-pytorch or small
    at: str | None = None  # dotted path of the block; None: the preset's depth
    kind: str | None = None  # variant of the loss
    weight: float | None = None  # lambda
    tau: float | Literal["auto"] | None = None  # temperature
    depth: float | None = None  # share of the blocks before the tap, where `at` is None
    diagonal: bool | None = None  # whether each sample is compared with itself
    pool: str | None = None  # none, mean or tokens
    normalize: str | None = None  # none, layer or unit
    norm_penalty: float | None = None
    t_window: float | None = None  # only pairs whose times are this near
    ignore_same_class: bool | None = None
    gather: bool | None = None  # one dispersion batch over all processes
    memory: int | None = None  # rows of earlier micro-batches that are kept
    schedule: str | None = None  # of the weight: constant, warmup, cosine-to-zero or stop-at
    schedule_steps: int = 0
    norm_matched: float | None = None  # a placebo in its place: features of this RMS, nothing spread

    def overrides(self) -> dict[str, Any]:
        """Keywords of `Dispersive.from_preset` that were set by hand."""
        options = {
            k: v for k, v in dataclasses.asdict(self).items() if k not in ("preset", "schedule_steps", "norm_matched")
        }
        if self.schedule:
            options["schedule"] = Schedule(self.schedule, self.schedule_steps)
        return {k: v for k, v in options.items() if v is not None}

    def check(self) -> None:
        """Raises ConfigError: no such preset or option, options at odds, or options without a preset."""
        if self.preset not in ("none", *PRESETS):
            raise ConfigError(f"unknown regularizer.preset {self.preset!r}; there are: none, {', '.join(PRESETS)}")
        measuring = RegularizerConfig("none", at=self.at, depth=self.depth, gather=self.gather)  # what "none" takes
        if self.preset == "none" and self != measuring:
            name = next(f.name for f in fields(self) if getattr(self, f.name) != getattr(measuring, f.name))
            raise ConfigError(
                f"regularizer.{name} is set and regularizer.preset is none, which adds no loss: choose one of "
                f"{', '.join(PRESETS)} to start from"
            )
        if self.schedule_steps and not self.schedule:
            raise ConfigError("regularizer.schedule_steps is set, and no regularizer.schedule that would use it")
        if self.norm_matched is not None and not self.norm_matched > 0:
            raise ConfigError(f"regularizer.norm_matched must be above 0, got {self.norm_matched}")
        if self.preset != "none":
            try:
                settings = preset_settings(self.preset, self.overrides())
                known = {f.name for f in fields(LossOptions)}
                LossOptions.of({name: value for name, value in settings.items() if name in known})
                check_number("weight", settings["weight"], at_least=0.0)
            except DispersiveError as error:
                raise ConfigError(f"regularizer: {error}") from error


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `batch_size` is global: processes and accumulation divide it."""

    data: str = "digits"  # a data set's name (digits, mnist, cifar10, a 2-D set), or a folder of images or of latents
    data_dir: str | None = None  # where mnist and cifar10 lie; None: the data folder
    image_size: int = 32  # side to which a folder's images are brought; named sets keep their own
    data_share: float = 1.0  # share of the training images that is used, the same of every class
    flip: bool = False  # random horizontal flips
    classes: tuple[str, ...] = ()  # of a store of latents; empty: all
    balanced: bool = False  # every class of a store equally often
    model: str = "DiT-T/2"  # or MLP, for 2-D sets
    objective: Literal["flow", "ddpm", "meanflow"] = "flow"
    steps: int = 600
    batch_size: int = 64
    accumulation: int = 1  # micro-batches per step; each is one batch to Dispersive Loss
    learning_rate: float = 4e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = 50
    grad_clip: float = 1.0  # largest norm of the gradient
    weight_decay: float = 0.0
    ema_decay: float = 0.99
    ema_widths: tuple[float, ...] = ()  # relative widths of two more averages, for any width after the fact
    class_dropout_prob: float = 0.1  # share of labels replaced by the null class, for guidance
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    seed: int = 0
    log_every: int = 25
    eval_every: int = 250  # held-out denoising loss
    checkpoint_every: int = 500
    keep_last: int = 2  # checkpoints kept; older ones are removed
    preview_images: int = 16  # in the grid drawn at each checkpoint; 0 is none
    tensorboard: bool = False  # event files beside metrics.jsonl
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on a GPU that has it, else fp32
    fsdp: bool = False  # shard parameters over processes (FSDP2), not only the batch
    compile_blocks: bool = False
    checkpointing: bool = False  # recompute blocks in backward: less memory, more time; not with MeanFlow

    def __post_init__(self) -> None:
        positive = (
            "steps",
            "batch_size",
            "accumulation",
            "learning_rate",
            "grad_clip",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep_last",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps", "preview_images"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed must be a number of 64 bits, got {self.seed}")
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be split into accumulation {self.accumulation} equal parts"
            )
        if not 0 <= self.class_dropout_prob < 1 or not 0 <= self.ema_decay < 1:
            raise ConfigError("class_dropout_prob and ema_decay must lie in [0, 1)")
        if not 0 < self.data_share <= 1:
            raise ConfigError(f"data_share must lie in (0, 1], got {self.data_share}")
        if self.objective not in ("flow", "ddpm", "meanflow"):
            raise ConfigError(f"unknown objective {self.objective!r}; there are: flow, ddpm, meanflow")
        if self.checkpointing and self.objective == "meanflow":
            raise ConfigError("checkpointing cannot go with meanflow, whose time derivative needs what it frees")
        if self.schedule not in ("constant", "cosine"):
            raise ConfigError(f"unknown schedule {self.schedule!r}; there are: constant, cosine")
        self.regularizer.check()
        if self.regularizer.memory and self.accumulation == 1:
            raise ConfigError(
                "regularizer.memory keeps rows of earlier micro-batches: with accumulation 1 there are none"
            )
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ConfigError(f"unknown precision {self.precision!r}; there are: auto, fp32, bf16")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "TrainConfig":
        values = json.loads(text)
        values |= {name: tuple(values.get(name, ())) for name in ("ema_widths", "classes")}
        return cls(**{**values, "regularizer": RegularizerConfig(**values["regularizer"])})


# Cadence and place change no number, so a resumed run may alter them.
FREE_TO_CHANGE = (
    "data_dir",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_last",
    "preview_images",
    "tensorboard",
)


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """What would change the result if `new` went on from a run of `old`, one line each."""
    a, b = dataclasses.asdict(old), dataclasses.asdict(new)
    return [f"{k}: {a[k]!r} -> {b[k]!r}" for k in a if a[k] != b[k] and k not in FREE_TO_CHANGE]


# fmt: off
TRAIN_PRESETS: dict[str, TrainConfig] = {
    "smoke": TrainConfig(steps=20, batch_size=32, warmup_steps=5, log_every=5, eval_every=10, checkpoint_every=10),
    "toy": TrainConfig(  # held-out denoising loss 0.827
        data="two-moons", model="MLP", steps=2000, batch_size=256, learning_rate=2e-3, preview_images=0),
    "digits": TrainConfig(),  # 30 s on two cores; base FD[digits-classifier48, N=500] = 3.99 [2.99, 5.10]
    "mnist-t": TrainConfig(  # 7 minutes on one core; FD[mnist-classifier48, N=2000] = 39.7 [35.3, 44.2], real 0.06
        data="mnist", model="DiT-T/4", steps=1500, learning_rate=2e-3, log_every=50),
    "cifar10-cpu": TrainConfig(  # an hour on one core; held-out denoising loss 0.190 on JPEG re-encoded images
        data="cifar10", model="DiT-T/4", flip=True, steps=10_000, learning_rate=1e-3, warmup_steps=200,
        ema_decay=0.999, log_every=50, eval_every=500),
    "cifar10-s2": TrainConfig(  # for one GPU; not run by us
        data="cifar10", model="DiT-S/2", flip=True, steps=200_000, batch_size=256, learning_rate=2e-4,
        schedule="constant", warmup_steps=1000, ema_decay=0.9999, ema_widths=(0.05, 0.1),
        log_every=100, eval_every=2000, checkpoint_every=5000, keep_last=3),
}
# fmt: on


# A store of latents of photographs, as notebook 13 makes one: 4x8x8, 600 rows.
PHOTOGRAPHS = TrainConfig(flip=True, steps=400, batch_size=32, learning_rate=2e-3, ema_decay=0.98, checkpoint_every=100)
TRAIN_PRESETS |= {"photographs": PHOTOGRAPHS}

# The recipe of the official SiT (AdamW 1e-4 constant, no decay, global batch 256, EMA 0.9999, 256 tokens), 80 epochs.
# Its gradient is not clipped: no norm comes near this one.
IMAGENET = TrainConfig(
    data="data/imagenet-latents",
    flip=True,
    steps=80 * 1_281_167 // 256,
    batch_size=256,
    learning_rate=1e-4,
    schedule="constant",
    warmup_steps=0,
    grad_clip=1e6,
    ema_decay=0.9999,
    log_every=100,
    eval_every=5_000,
    checkpoint_every=10_000,
)
# The loss as its PyTorch code has it, which the local batch of 32 on 8 processes belongs to.
IMAGENET_ARMS = {"base": RegularizerConfig(), "disp": RegularizerConfig(preset="official-pytorch")}
TRAIN_PRESETS |= {
    f"imagenet-{size.lower()}2-{arm}": dataclasses.replace(IMAGENET, model=f"DiT-{size}/2", regularizer=regularizer)
    for size in ("S", "B", "L", "XL")
    for arm, regularizer in IMAGENET_ARMS.items()
}


def train_preset(name: str, **changes: Any) -> TrainConfig:
    """The preset `name` with some fields changed.

    Raises:
        ConfigError: no preset has this name.
    """
    if name not in TRAIN_PRESETS:
        raise ConfigError(f"unknown preset {name!r}; there are: {', '.join(TRAIN_PRESETS)}")
    return dataclasses.replace(TRAIN_PRESETS[name], **changes)


def with_settings(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """`config` with fields replaced by name; those of the regulariser are written "regularizer.gather".

    Raises:
        ConfigError: no such field, or a value of another type.
    """
    regularizer = config.regularizer
    for name, value in settings.items():
        part, dot, inner = name.rpartition(".")
        hints = get_type_hints(RegularizerConfig if dot else TrainConfig)
        if inner not in hints or part not in ("", "regularizer"):
            inside = [f"regularizer.{n}" for n in get_type_hints(RegularizerConfig)]
            raise ConfigError(f"no setting is named {name!r}; there are: {', '.join([*hints, *inside])}")
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, hints[inner]):
            raise ConfigError(f"{name}={value!r} is not of type {_type_name(hints[inner])}")
        change: dict[str, Any] = {inner: value}
        if dot:
            regularizer = dataclasses.replace(regularizer, **change)
        else:
            config = dataclasses.replace(config, **change)
    return dataclasses.replace(config, regularizer=regularizer)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from the command line is of a field's type; a whole number will do for a float."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    if args:
        return any(_fits(value, a) for a in args)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)).removeprefix("typing.") if not get_args(hint) else str(hint)
