"""Guidance: a callable `guidance(model, x, t)` that a sampler uses in the model's place.

t is a number where all samples share one time (fixed-step samplers), so that deciding costs no
synchronisation, or a tensor (B,).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .paths import expand

SLACK = 1e-6  # of an end of the interval: a step at 0.3 may come as 0.30000000000000004, or in float32


def times(t: float | Tensor, x: Tensor) -> Tensor:
    """t as (B,), in float32 at least: half precision cannot tell neighbouring times apart."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(t, Tensor):
        return t.to(x.device, dtype).expand(x.shape[0])
    return torch.full((x.shape[0],), t, device=x.device, dtype=dtype)


def call(model: Callable, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    return model(x, t) if y is None else model(x, t, y)


@dataclass(frozen=True)
class ClassifierFree:
    """Ho & Salimans, arXiv 2207.12598: away from the null class towards y (B,), both in one batch of 2B.

    weak + scale (strong - weak) where t is in [low, high] (t = 1 is noise; the guidance interval of arXiv
    2404.07724); elsewhere, or at scale 1, the model is called once with y. Every channel of x is guided;
    channels=3 guides the first three only, as the public DiT and SiT sampling code does. A learned variance
    is never guided.
    """

    y: Tensor | None
    null_label: int | None
    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    channels: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ConfigError(f"guidance from t = {self.low} to {self.high}: give 0 <= low <= high <= 1")

    def __call__(self, model: Callable, x: Tensor, t: float | Tensor) -> Tensor:
        low, high = self.low - SLACK, self.high + SLACK
        if self.scale == 1.0 or (not isinstance(t, Tensor) and not low <= t <= high):
            return call(model, x, times(t, x), self.y)
        weak, strong = self.weak_and_strong(model, x, times(t, x))
        n = self.channels or x.shape[1]
        guided = weak[:, :n] + self.scale * (strong[:, :n] - weak[:, :n])
        guided = torch.cat([guided, strong[:, n:]], dim=1)
        if not isinstance(t, Tensor):
            return guided
        return torch.where(expand((t >= low) & (t <= high), x), guided, strong)

    def weak_and_strong(self, model: Callable, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        if self.y is None or self.null_label is None:
            raise ConfigError("classifier-free guidance needs y and a null class: train with class dropout, or scale=1")
        y = torch.cat([torch.full_like(self.y, self.null_label), self.y])
        return model(torch.cat([x, x]), torch.cat([t, t]), y).chunk(2)


@dataclass(frozen=True)
class AutoGuidance(ClassifierFree):
    """Karras et al., arXiv 2406.02507: away from a weaker model of the same task (smaller, or trained
    less), same y or none.
    """

    y: Tensor | None = None
    null_label: int | None = None
    weak_model: Callable | None = None

    def weak_and_strong(self, model: Callable, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        if self.weak_model is None:
            raise ConfigError("autoguidance needs weak_model=, a worse model of the same task")
        return call(self.weak_model, x, t, self.y), call(model, x, t, self.y)
