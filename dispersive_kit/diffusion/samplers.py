"""Samplers with one signature: `sampler(model, x, ts, *, guidance=None, callback=None, seeds=None, **options)`.

Each is a step from time t to an earlier time s, `step(f, x, t, s, **options)`; `@_sampler` adds the loop over the
times. x (B, ...) starts as noise (`initial_noise`), and keeps its dtype; ts decreases from noise to data (`time_grid`).
An image depends on its own seed only. callback(i, s, x) is called after each step. euler, heun, rk4 and dopri5 need a
model of the velocity, meanflow one of the average velocity; the others have `prediction`. If the model returns twice
the channels, the second half is a learned variance: ddpm(learned_variance=True) uses it, the others drop it.

All raise ConfigError: times that do not decrease within [0, 1], another number of channels, no seeds where noise is
added, guidance without y or null class, and the errors of the step.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dispersive_kit.diffusion.guidance import times
from dispersive_kit.diffusion.paths import DDPM_LINEAR, LINEAR, Path, expand
from dispersive_kit.errors import ConfigError

NOISE_STREAM = 0x5DEECE66D  # the noise that steps add is independent of the initial noise


def time_grid(num_steps: int, t_min: float = 0.0, t_max: float = 1.0) -> Tensor:
    """num_steps + 1 equally spaced times from t_max down to t_min, float64: on `DDPMPath`, "trailing" spacing."""
    if num_steps < 1:
        raise ConfigError(f"num_steps {num_steps} must be at least 1")
    return torch.linspace(t_max, t_min, num_steps + 1, dtype=torch.float64)


def initial_noise(seeds: Sequence[int], shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """(len(seeds), *shape) noise on the CPU; row i depends on seeds[i] only."""
    return _draw_each([torch.Generator().manual_seed(int(s)) for s in seeds], shape).to(dtype)


def _draw_each(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """One N(0, I) sample from each generator, drawn on the CPU in float32: the same for all devices and dtypes."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


class _Field:
    """f(x, t): the model, guided, in the dtype of x; `f.noise(x)`: fresh noise for each sample from its own seed."""

    def __init__(self, model: Callable, guidance: Callable | None, seeds: Sequence[int] | None) -> None:
        self.model, self.guidance = model, guidance
        self.generators = [torch.Generator().manual_seed(int(s) ^ NOISE_STREAM) for s in seeds or ()]

    def __call__(self, x: Tensor, t: float | Tensor, r: float | None = None) -> Tensor:
        """Without a learned variance. r: MeanFlow's model returns the velocity averaged from r to t."""
        return self.all_channels(x, t, r)[:, : x.shape[1]]

    def all_channels(self, x: Tensor, t: float | Tensor, r: float | None = None) -> Tensor:
        """With the channels of a learned variance, if the model has them, after the others."""
        model: Callable = self.model
        if r is not None:
            model = lambda x, t, *y: self.model(x, t, *y, r=torch.full_like(t, r))  # noqa: E731
        out = model(x, times(t, x)) if self.guidance is None else self.guidance(model, x, t)
        C = x.shape[1]
        if out.shape not in (x.shape, (len(x), 2 * C, *x.shape[2:])):
            raise ConfigError(
                f"the model returned {tuple(out.shape)} for a state {tuple(x.shape)}: a sampler takes {C} channels, or "
                f"{2 * C} with a learned variance"
            )
        return out.to(x.dtype)

    def noise(self, x: Tensor) -> Tensor:
        if len(self.generators) != len(x):
            raise ConfigError(f"this sampler adds noise: give seeds=, one for each of the {len(x)} samples")
        return _draw_each(self.generators, x.shape[1:]).to(x)


def _sampler(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The sampler of a step: x = step(f, x, t, s, **options) from each time to the next."""

    @torch.no_grad()
    def run(
        model: Callable,
        x: Tensor,
        ts: Sequence[float] | Tensor,
        *,
        guidance: Callable | None = None,
        callback: Callable[[int, float, Tensor], None] | None = None,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> Tensor:
        grid = [float(t) for t in ts]
        if len(grid) < 2 or not all(1 >= t > s >= 0 for t, s in pairwise(grid)):  # NaN fails every comparison
            raise ConfigError(f"ts must decrease within [0, 1], noise to data, and begins {grid[:3]}: use time_grid")
        f = _Field(model, guidance, seeds)
        for i, (t, s) in enumerate(pairwise(grid)):
            x = step(f, x, t, s, **options)
            if callback is not None:
                callback(i, s, x)
        return x

    called_as = inspect.signature(run)
    functools.update_wrapper(run, step).__dict__["__signature__"] = called_as  # inspect.getsource shows the step
    return run


@_sampler
def euler(f: _Field, x: Tensor, t: float, s: float) -> Tensor:
    """First order, one evaluation a step."""
    return x + (s - t) * f(x, t)


@_sampler
def heun(f: _Field, x: Tensor, t: float, s: float) -> Tensor:
    """Second order, two evaluations a step: the trapezoidal rule with an Euler predictor."""
    slope = f(x, t)
    return x + (s - t) / 2 * (slope + f(x + (s - t) * slope, s))


@_sampler
def rk4(f: _Field, x: Tensor, t: float, s: float) -> Tensor:
    """Fourth order, four evaluations a step: the classical Runge-Kutta method."""
    h, middle = s - t, (s + t) / 2
    k1 = f(x, t)
    k2 = f(x + h / 2 * k1, middle)
    k3 = f(x + h / 2 * k2, middle)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + f(x + h * k3, s))


@_sampler
def ddpm(
    f: _Field,
    x: Tensor,
    t: float,
    s: float,
    path: Path = DDPM_LINEAR,
    prediction: str = "eps",
    learned_variance: bool = False,
) -> Tensor:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2) between any two times of any path; needs seeds.

    The variance is that of the posterior, its lower bound; learned_variance: the second half of the model's channels
    interpolates between the logarithms of its two bounds (arXiv 2102.09672, equation 15).
    """
    a, b, low, high = path.posterior(_at(t), _at(s))
    out = f.all_channels(x, t)
    if learned_variance and out.shape == x.shape:
        raise ConfigError("learned_variance=True needs a model with learn_sigma, which has twice the channels")
    x0, _ = _x0_and_eps(out, x, t, path, prediction)
    mean = a * x + b * x0
    if low <= 0:  # s is the data: no noise is added
        return mean
    share = (out[:, x.shape[1] :] + 1) / 2 if learned_variance else 0.0
    return mean + (0.5 * (share * high.log() + (1 - share) * low.log())).exp() * f.noise(x)


@_sampler
def ddim(f: _Field, x: Tensor, t: float, s: float, path: Path = DDPM_LINEAR, prediction: str = "eps") -> Tensor:
    """arXiv 2010.02502, equation 12, without noise."""
    x0, eps = _x0_and_eps(f(x, t), x, t, path, prediction)
    return path.alpha(_at(s)) * x0 + path.sigma(_at(s)) * eps


@_sampler
def euler_maruyama(
    f: _Field, x: Tensor, t: float, s: float, path: Path = LINEAR, prediction: str = "v", churn: float = 1.0
) -> Tensor:
    """The reverse SDE with diffusion w(t) = churn * sigma(t), SiT's equation 5 (SiT's code: churn=2); needs seeds.

    x_s = x - h (v - w score / 2) + sqrt(w h) z with h = t - s; the last step, to the data, adds no noise.
    churn=0 is Euler.
    """
    h = t - s
    x0, eps = _x0_and_eps(f(x, t), x, t, path, prediction)
    drift = path.velocity(x0, eps, _at(t))
    if s <= path.t_min:
        return x - h * drift
    w = churn * path.sigma(_at(t))
    return x - h * (drift + churn / 2 * eps) + (w * h).sqrt() * f.noise(x)  # w score = -churn eps


def _at(t: float) -> Tensor:
    """A time as a float64 scalar tensor: the path is exact, and a product with x keeps the dtype and device of x."""
    return torch.tensor(t, dtype=torch.float64)


def _x0_and_eps(out: Tensor, x: Tensor, t: float, path: Path, prediction: str) -> tuple[Tensor, Tensor]:
    """Data and noise in x, from the model's output."""
    if prediction in ("eps", "score") and path.alpha(_at(t)) < 1e-6:
        raise ConfigError(
            f"at t = {t:g} x is pure noise, and a prediction of {prediction} does not determine the data: begin at "
            "time_grid(n, t_max=1 - 1e-3)"
        )
    return path.x0_and_eps(out, x, _at(t), prediction)


@_sampler
def meanflow(f: _Field, x: Tensor, t: float, s: float) -> Tensor:
    """x_s = x - (t - s) u(x, r=s, t), MeanFlow's equation 12 (arXiv 2505.13447): one step is exact if u is exact."""
    return x - (t - s) * f(x, t, r=s)


# Dormand & Prince (1980): stage weights with the node in front, and the weights of the error estimate.
DOPRI5: tuple[tuple[float, tuple[float, ...]], ...] = (
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1.0, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1.0, (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
DOPRI5_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@_sampler
def dopri5(
    f: _Field, x: Tensor, start: float, end: float, rtol: float = 1e-5, atol: float = 1e-5, max_steps: int = 1000
) -> Tensor:
    """Adaptive, fifth order, from each time of ts to the next; with ts = [1, 0] it chooses all steps itself.

    Each sample has its own step size, and does not depend on the other samples.
    Raises ConfigError: the model returns NaN or infinity, or max_steps is not enough.
    """
    t = times(start, x)
    h = end - t
    slope = f(x, t)
    for _ in range(max_steps):
        h = torch.maximum(h, end - t)  # both negative, or 0 where a sample has arrived
        ks, x_new = [slope], x
        for node, weights in DOPRI5:
            x_new = x + (expand(h, x) * sum(w * k for w, k in zip(weights, ks, strict=True))).to(x.dtype)
            ks.append(f(x_new, t + node * h))
        error = expand(h, x) * sum(w * k for w, k in zip(DOPRI5_ERROR, ks, strict=True))
        error = error / (atol + rtol * torch.maximum(x.abs(), x_new.abs()))
        size = error.square().flatten(1).mean(1).sqrt()  # (B,)
        if not bool(size.isfinite().all()):
            raise ConfigError(f"dopri5 found NaN or infinity near t = {float(t.min()):.3g}: the model returned it")
        taken = size <= 1
        x, slope = torch.where(expand(taken, x), x_new, x), torch.where(expand(taken, x), ks[-1], slope)
        t = torch.where(taken, torch.where(h <= end - t, end, t + h), t)
        if bool((t <= end).all()):
            return x
        h = h * (0.9 * size.clamp(min=1e-10) ** -0.2).clamp(0.2, 10.0)
    raise ConfigError(f"dopri5 is at t = {float(t.max()):.3g} after {max_steps} steps: raise rtol or max_steps")
