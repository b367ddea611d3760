"""What a run is: frozen dataclasses, and the presets by name."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from dispersive_kit.errors import ConfigError


@dataclass(frozen=True)
class RegularizerConfig:
    """Which Dispersive Loss is added, if any. What is None is taken from the preset."""

    preset: str = "none"  # none, paper, official-pytorch or small
    at: str | None = None  # dotted path of the block; None: the preset's depth
    kind: str | None = None  # variant of the loss
    weight: float | None = None  # lambda
    tau: float | None = None  # temperature

    def overrides(self) -> dict[str, Any]:
        """The options that were set by hand."""
        options = {k: v for k, v in dataclasses.asdict(self).items() if k != "preset"}
        return {k: v for k, v in options.items() if v is not None}


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `batch_size` is global: processes and accumulation divide it."""

    data: str = "digits"  # a data set's name, or the path of a folder of images
    data_dir: str | None = None  # where mnist and cifar10 lie; None: the data folder
    image_size: int = 32  # side to which a folder's images are brought; named sets keep their own
    flip: bool = False  # random horizontal flips
    model: str = "DiT-T/2"
    steps: int = 600
    batch_size: int = 64
    accumulation: int = 1  # micro-batches per step; each is one batch to Dispersive Loss
    learning_rate: float = 4e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = 50
    grad_clip: float = 1.0  # largest norm of the gradient
    weight_decay: float = 0.0
    ema_decay: float = 0.99
    class_dropout_prob: float = 0.1  # share of labels replaced by the null class, for guidance
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    seed: int = 0
    log_every: int = 25
    eval_every: int = 250  # held-out denoising loss
    checkpoint_every: int = 500
    keep_last: int = 2  # checkpoints kept; older ones are removed

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
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be split into accumulation {self.accumulation} equal parts"
            )
        if not 0 <= self.class_dropout_prob < 1 or not 0 <= self.ema_decay < 1:
            raise ConfigError("class_dropout_prob and ema_decay must lie in [0, 1)")
        if self.schedule not in ("constant", "cosine"):
            raise ConfigError(f"unknown schedule {self.schedule!r}; there are: constant, cosine")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "TrainConfig":
        fields = json.loads(text)
        return cls(**{**fields, "regularizer": RegularizerConfig(**fields["regularizer"])})


# Cadence and place change no number, so a resumed run may alter them.
FREE_TO_CHANGE = ("data_dir", "log_every", "eval_every", "checkpoint_every", "keep_last")


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """What would change the result if `new` went on from a run of `old`, one line each."""
    a, b = dataclasses.asdict(old), dataclasses.asdict(new)
    return [f"{k}: {a[k]!r} -> {b[k]!r}" for k in a if a[k] != b[k] and k not in FREE_TO_CHANGE]


TRAIN_PRESETS: dict[str, TrainConfig] = {
    "smoke": TrainConfig(steps=20, batch_size=32, warmup_steps=5, log_every=5, eval_every=10, checkpoint_every=10),
    "digits": TrainConfig(),  # 30 s on two cores; base FD[digits-classifier48, N=500] = 3.99 [2.99, 5.10]
    "cifar10-cpu": TrainConfig(
        data="cifar10",
        model="DiT-T/4",
        flip=True,
        steps=10_000,
        learning_rate=1e-3,
        warmup_steps=200,
        ema_decay=0.999,
        log_every=50,
        eval_every=500,
        checkpoint_every=500,
    ),
}


def train_preset(name: str, **changes: Any) -> TrainConfig:
    """The preset `name` with some fields changed.

    Raises:
        ConfigError: no preset has this name.
    """
    if name not in TRAIN_PRESETS:
        raise ConfigError(f"unknown preset {name!r}; there are: {', '.join(TRAIN_PRESETS)}")
    return dataclasses.replace(TRAIN_PRESETS[name], **changes)
