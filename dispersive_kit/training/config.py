"""The settings of a training run, checked when they are created, and the presets by name."""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from dispersive_kit.errors import ConfigError, DispersiveError, form_error
from dispersive_kit.regularizers.losses import PRESETS, RIVALS, preset_settings
from dispersive_kit.regularizers.taps import Schedule

Share = Annotated[float, Field(ge=0, lt=1)]
# What may be set beside a preset, where not everything may: without a loss, how dispersion is measured.
TAKES: dict[str, tuple[str, ...]] = dict.fromkeys(RIVALS, ("at", "weight", "depth", "schedule", "schedule_steps"))
TAKES["none"] = ("at", "depth", "gather", "group_size")
# Settings of version 0.1 that are no more, with their defaults.
RETIRED = {"classes": [], "balanced": False, "ema_widths": [], "fsdp": False, "regularizer.ignore_same_class": None}
# When a run logs and saves, and where its data are, changes no number: a resumed run may change these.
FREE_TO_CHANGE = {"data_dir", "log_every", "eval_every", "checkpoint_every", "keep_last", "preview_images"}


class _Settings(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """Wrong values raise one ConfigError, which names field, value and cure."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise form_error(error, error.title, known=type(self).model_fields) from None

    def changed(self, **values: Any) -> Self:
        """A copy with some fields replaced; all are checked again."""
        return type(self)(**{**dict(self), **values})


class RegularizerConfig(_Settings, title="regularizer", frozen=True):
    """Which Dispersive Loss is added, if any. A field that is None has the value of the preset."""

    preset: str = "none"  # none, paper, official-pytorch, small, care; or a rival: repa, clean-patch, layersync
    at: str | None = None  # dotted path of the block; None: the preset's depth
    kind: str | None = None  # variant of the loss
    weight: float | None = None  # lambda
    tau: float | Literal["auto"] | None = None  # temperature
    depth: float | None = None  # share of the blocks before the tap, where `at` is None
    diagonal: bool | None = None  # whether each sample is compared with itself
    pool: str | None = None  # none, mean or tokens
    normalize: str | None = None  # none, layer, unit or batch
    norm_penalty: float | None = None
    t_window: float | None = None  # only pairs whose times differ by at most this
    gather: bool | None = None  # one dispersion batch over all processes
    group_size: PositiveInt | None = None  # images that are dispersed together; None: the local batch
    memory: int | None = None  # rows of earlier micro-batches that are kept
    schedule: str | None = None  # of the weight: constant, warmup, cosine-to-zero or stop-at
    schedule_steps: int = 0
    norm_matched: PositiveFloat | None = None  # a placebo instead: brings features to this RMS, spreads nothing

    @property
    def added(self) -> bool:
        """Whether it is part of the objective, or only measured."""
        return self.preset != "none"

    @property
    def disperses(self) -> bool:
        """Whether the objective compares the images of a batch with each other."""
        return self.added and self.preset not in RIVALS

    def overrides(self) -> dict[str, Any]:
        """Keywords of `Dispersive.from_preset` that were set by hand."""
        options = self.model_dump(exclude_none=True, exclude={"preset", "schedule", "schedule_steps", "norm_matched"})
        return options | ({"schedule": Schedule(self.schedule, self.schedule_steps)} if self.schedule else {})

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        changed = self.model_dump(exclude_defaults=True, exclude={"preset"})
        takes = TAKES.get(self.preset, tuple(changed))
        if odd := [name for name in changed if name not in takes]:
            cure = f"takes only {', '.join(takes)}: leave it out, or choose another preset, such as paper"
            raise ConfigError(f"{odd[0]} is set, and preset {self.preset} {cure}")
        if self.schedule_steps and not self.schedule:
            raise ConfigError("schedule_steps is set, but no schedule: set regularizer.schedule too")
        if self.added:
            try:
                preset_settings(self.preset, self.overrides(), {"none": {}, **PRESETS, **RIVALS})
            except DispersiveError as error:
                raise ConfigError(str(error)) from error
        return self


class TrainConfig(_Settings, title="training", frozen=True):
    """One training run. `batch_size` is global: processes and accumulation divide it."""

    data: str = "digits"  # a data set's name (digits, mnist, cifar10, a 2-D set), or a folder of images or of latents
    data_dir: str | None = None  # where mnist and cifar10 lie; None: the data folder
    image_size: int = 32  # a folder's images are resized to this side; named sets keep their own
    data_share: Annotated[float, Field(gt=0, le=1)] = 1.0  # used share of the training images, equal in all classes
    flip: bool = False  # random horizontal flips
    model: str = "DiT-T/2"  # or MLP, for 2-D sets
    objective: Literal["flow", "ddpm", "meanflow"] = "flow"
    steps: PositiveInt = 600
    batch_size: PositiveInt = 64
    accumulation: PositiveInt = 1  # micro-batches per step; each is one batch to Dispersive Loss
    learning_rate: PositiveFloat = 4e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 50
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = (0.9, 0.999)  # of AdamW; (0.9, 0.95) in some recipes
    weight_decay: NonNegativeFloat = 0.0  # of all parameters
    grad_clip: PositiveFloat = 1.0  # largest norm of the gradient
    ema_decay: Share = 0.99
    class_dropout_prob: Share = 0.1  # share of labels replaced by the null class, for guidance
    regularizer: RegularizerConfig = RegularizerConfig()
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    log_every: PositiveInt = 25
    eval_every: PositiveInt = 250  # held-out denoising loss
    checkpoint_every: PositiveInt = 500
    keep_last: PositiveInt = 2  # checkpoints kept; older ones are removed
    preview_images: NonNegativeInt = 16  # in the grid drawn at each checkpoint; 0 is none
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on a GPU that has it, else fp32
    compile_blocks: bool = False
    checkpointing: bool = False  # recompute blocks in backward: less memory, more time; not with MeanFlow

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.batch_size % self.accumulation:
            parts = f"accumulation {self.accumulation} equal parts"
            raise ConfigError(f"batch_size {self.batch_size} cannot be split into {parts}")
        if self.checkpointing and self.objective == "meanflow":
            raise ConfigError("checkpointing frees activations that meanflow's time derivative needs: use one of them")
        if self.regularizer.memory and self.accumulation == 1:
            raise ConfigError("regularizer.memory keeps rows of earlier micro-batches: set accumulation above 1")
        return self

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then constant or half a cosine down to zero."""
        warmup = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        decay = 0.5 * (1 + math.cos(math.pi * (step / self.steps))) if self.schedule == "cosine" else 1.0
        return self.learning_rate * warmup * decay

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Settings from the text of a run's config.json, also one of version 0.1.

        Raises ConfigError: a setting is unknown, or was removed since and is not at its old default in this run.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or not isinstance(values.get("regularizer"), dict):
            raise ConfigError(f"{text[:40]!r} is no JSON object of settings by name with a `regularizer` in it")
        values.pop("tensorboard", None)  # removed since; it changed no number
        for name, default in RETIRED.items():
            place, _, field = name.rpartition(".")
            if (value := (values[place] if place else values).pop(field, default)) != default:
                raise ConfigError(
                    f"{name} is {value!r}, which only version 0.1 supports: use it, or train again without this setting"
                )
        return cls(**{**values, "regularizer": RegularizerConfig(**values["regularizer"])})


# fmt: off
TRAIN_PRESETS: dict[str, TrainConfig] = {
    "smoke": TrainConfig(steps=20, batch_size=32, warmup_steps=5, log_every=5, eval_every=10, checkpoint_every=10),
    "toy": TrainConfig(  # held-out denoising loss 0.827
        data="two-moons", model="MLP", steps=2000, batch_size=256, learning_rate=2e-3, preview_images=0),
    "digits": TrainConfig(),  # 30 s on two cores; base FD[digits-classifier48, N=500] = 3.99 [2.99, 5.10]
    "digits-long": TrainConfig(  # 6 minutes on one core: digits that a person can read
        steps=6000, learning_rate=1e-3, ema_decay=0.999),
    "mnist-t": TrainConfig(  # 7 minutes on one core; FD[mnist-classifier48, N=2000] = 39.7 [35.3, 44.2], real 0.06
        data="mnist", model="DiT-T/4", steps=1500, learning_rate=2e-3, log_every=50),
    "mnist-long": TrainConfig(  # 40 minutes on one core: sharper digits than those of 8x8 pixels
        data="mnist", model="DiT-T/4", steps=12_000, learning_rate=1e-3, ema_decay=0.999, log_every=50),
    "cifar10-cpu": TrainConfig(  # an hour on one core; held-out denoising loss 0.190 on JPEG re-encoded images
        data="cifar10", model="DiT-T/4", flip=True, steps=10_000, learning_rate=1e-3, warmup_steps=200,
        ema_decay=0.999, log_every=50, eval_every=500),
    "cifar10-s2": TrainConfig(  # for one GPU; not run by us
        data="cifar10", model="DiT-S/2", flip=True, steps=200_000, batch_size=256, learning_rate=2e-4,
        schedule="constant", warmup_steps=1000, ema_decay=0.9999,
        log_every=100, eval_every=2000, checkpoint_every=5000, keep_last=3),
    "photographs": TrainConfig(  # a store of latents of photographs, as notebook 13 makes one: 4x8x8, 600 rows
        flip=True, steps=400, batch_size=32, learning_rate=2e-3, ema_decay=0.98, checkpoint_every=100),
}
# fmt: on

# The recipe of the official SiT (AdamW 1e-4 constant, no decay, global batch 256, EMA 0.9999, 256 tokens), 80 epochs.
# SiT does not clip the gradient: no norm comes near this grad_clip.
IMAGENET = TrainConfig(
    data="data/imagenet-latents", flip=True, steps=80 * 1_281_167 // 256, batch_size=256, learning_rate=1e-4,
    schedule="constant", warmup_steps=0, grad_clip=1e6, ema_decay=0.9999,
    log_every=100, eval_every=5_000, checkpoint_every=10_000,
)  # fmt: skip
# Both published settings with the local batch size of their source, on any number of processes. The placebo's RMS is a
# guess: set it to the feature_rms at the end of the -paper run.
ARMS = {
    "base": RegularizerConfig(),
    "paper": RegularizerConfig(preset="paper", group_size=16),
    "disp": RegularizerConfig(preset="official-pytorch", group_size=32),
    "placebo": RegularizerConfig(preset="paper", norm_matched=4.0, group_size=16),
}
_ON_GPUS = {f"imagenet-{size.lower()}2": IMAGENET.changed(model=f"DiT-{size}/2") for size in ("S", "B", "L", "XL")}
TRAIN_PRESETS |= {
    f"{name}-{arm}": config.changed(regularizer=regularizer)
    for name, config in (_ON_GPUS | {"cifar10-s2": TRAIN_PRESETS["cifar10-s2"]}).items()
    for arm, regularizer in ARMS.items()
}


def train_preset(name: str, **changes: Any) -> TrainConfig:
    """The preset `name` with some fields changed. Raises ConfigError: no preset has this name."""
    if name not in TRAIN_PRESETS:
        raise ConfigError(f"unknown preset {name!r}; there are: {', '.join(TRAIN_PRESETS)}")
    return TRAIN_PRESETS[name].changed(**changes)


def with_settings(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """`config` with fields replaced by name; names of the regulariser's fields are like "regularizer.gather"."""
    start = "regularizer."
    inner = {name.removeprefix(start): value for name, value in settings.items() if name.startswith(start)}
    own = {name: value for name, value in settings.items() if not name.startswith(start)}
    return config.changed(**{"regularizer": config.regularizer.changed(**inner), **own})
