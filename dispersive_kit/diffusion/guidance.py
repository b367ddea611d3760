"""Guidance: a callable `guidance(model, x, t)` that a sampler calls instead of the model.

t is a number where all samples share one time (fixed-step samplers), so that the comparison with the interval
costs no synchronisation; otherwise it is a tensor (B,).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dispersive_kit.diffusion.paths import expand
from dispersive_kit.errors import ConfigError

SLACK = 1e-6  # tolerance at both ends of the interval: a time 0.3 may be 0.30000000000000004, or float32


def times(t: float | Tensor, x: Tensor) -> Tensor:
    """t as (B,), in float32 at least: half precision cannot tell neighbouring times apart."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(t, Tensor):
        return t.to(x.device, dtype).expand(x.shape[0])
    return torch.full((x.shape[0],), t, device=x.device, dtype=dtype)


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) towards y (B,), in one batch of 2B.

    Returns null + scale (given - null), of the outputs for the null class and for y, where t is in [low, high] (t = 1
    is noise; the guidance interval of arXiv 2404.07724); elsewhere, or at scale 1, the output for y. All channels of x
    are guided (the public DiT and SiT code guides the first three only), those of a learned variance are not.
    Raises ConfigError: low and high are no interval in [0, 1]; y or a null class is missing and the scale is not 1.
    """

    y: Tensor | None
    null_label: int | None
    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ConfigError(f"guidance from t = {self.low} to {self.high}: give 0 <= low <= high <= 1")

    def __call__(self, model: Callable, x: Tensor, t: float | Tensor) -> Tensor:
        low, high, y = self.low - SLACK, self.high + SLACK, self.y
        if self.scale == 1.0 or (not isinstance(t, Tensor) and not low <= t <= high):
            return model(x, times(t, x)) if y is None else model(x, times(t, x), y)
        if y is None or self.null_label is None:
            raise ConfigError("classifier-free guidance needs y and a null class: train with class dropout, or scale=1")
        both = torch.cat([torch.full_like(y, self.null_label), y])
        null, given = model(torch.cat([x, x]), times(t, x).repeat(2), both).chunk(2)
        C = x.shape[1]
        guided = null[:, :C] + self.scale * (given[:, :C] - null[:, :C])
        guided = torch.cat([guided, given[:, C:]], dim=1)
        if not isinstance(t, Tensor):
            return guided
        return torch.where(expand((t >= low) & (t <= high), x), guided, given)
