"""Samplers with one signature: `sampler(model, x, ts, *, guidance=None, callback=None, seeds=None)` from
noise to data.

x (B, ...) starts as noise (`initial_noise`), ts decreases (`time_grid`). The ODE samplers take a velocity
model, the others say in `prediction` what the model gives. callback(step, t, x) sees x after each step.
State stays in the dtype of x, and an image depends on its own seed only.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import ConfigError
from .guidance import call, times

Times = Sequence[float] | Tensor
Callback = Callable[[int, float, Tensor], None]


def time_grid(num_steps: int, t_min: float = 0.0, t_max: float = 1.0) -> Tensor:
    """num_steps + 1 equally spaced times from t_max down to t_min, float64. For `DDPMPath` this is
    "trailing" spacing.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps {num_steps} must be at least 1")
    return torch.linspace(t_max, t_min, num_steps + 1, dtype=torch.float64)


def generators(seeds: Sequence[int], stream: int = 0) -> list[torch.Generator]:
    """One generator per sample, on the CPU so that an image is the same on every device; stream 1 is not
    stream 0.
    """
    return [torch.Generator().manual_seed(int(seed) ^ (stream * 0x5DEECE66D)) for seed in seeds]


def draw(sources: Sequence[torch.Generator], shape: Sequence[int], like: Tensor) -> Tensor:
    """One N(0, I) sample per generator, drawn in float32 whatever the dtype, so that precisions share their
    noise.
    """
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in sources]).to(like)


def initial_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(len(seeds), *shape) noise; row i is a function of seeds[i] alone."""
    return draw(generators(seeds), shape, torch.empty(0, device=device, dtype=dtype))


def evaluate(model: Callable, x: Tensor, t: float | Tensor, guidance: Callable | None) -> Tensor:
    out = call(model, x, times(t, x), None) if guidance is None else guidance(model, x, t)
    return out.to(x.dtype)


def march(step: Callable, x: Tensor, ts: Times, callback: Callback | None) -> Tensor:
    """x = step(x, t, s) for each t and the next time s."""
    grid = [float(t) for t in ts]
    if any(s >= t for t, s in pairwise(grid)):
        raise ConfigError(
            f"ts must decrease from noise to data, and runs {grid[0]:g}, {grid[1]:g}, ...: use time_grid"
        )
    for i, (t, s) in enumerate(pairwise(grid)):
        x = step(x, t, s)
        if callback is not None:
            callback(i, s, x)
    return x


@torch.no_grad()
def euler(
    model: Callable,
    x: Tensor,
    ts: Times,
    *,
    guidance: Callable | None = None,
    callback: Callback | None = None,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """First order, one evaluation a step."""
    v = partial(evaluate, model, guidance=guidance)
    return march(lambda x, t, s: x + (s - t) * v(x, t), x, ts, callback)


@torch.no_grad()
def heun(
    model: Callable,
    x: Tensor,
    ts: Times,
    *,
    guidance: Callable | None = None,
    callback: Callback | None = None,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Second order, two evaluations a step (the trapezoidal rule with an Euler predictor)."""
    v = partial(evaluate, model, guidance=guidance)

    def step(x: Tensor, t: float, s: float) -> Tensor:
        slope = v(x, t)
        return x + (s - t) / 2 * (slope + v(x + (s - t) * slope, s))

    return march(step, x, ts, callback)
