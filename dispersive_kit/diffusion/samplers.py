"""Samplers with one signature: `sampler(model, x, ts, *, guidance=None, callback=None, seeds=None,
**options)`.

x (B, ...) starts as noise (`initial_noise`) and ts falls from noise to data (`time_grid`). euler, heun, rk4
and dopri5 take a model of the velocity; the others say in `prediction` what the model gives; of a model with twice
the channels the second half, a learned variance, is read by ddpm(variance="learned") and dropped by the others.
callback(step, t, x) sees x after each step. The state stays in the dtype of x, and an image depends on its own seed
only. Raises ConfigError: times that do not fall within [0, 1], channels of another number, no seeds where noise is
added, a guidance that cannot be had, and what a sampler says of itself.
"""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .guidance import AutoGuidance, call, times
from .paths import DDPM_LINEAR, LINEAR, Path, expand

Times = Sequence[float] | Tensor
Callback = Callable[[int, float, Tensor], None]
Step = Callable[[Tensor, float, float], Tensor]
NOISE_STREAM = 0x5DEECE66D  # sets the noise added on the way apart from the noise started from


def time_grid(num_steps: int, t_min: float = 0.0, t_max: float = 1.0) -> Tensor:
    """num_steps + 1 equal steps from t_max down to t_min, float64; on `DDPMPath` this is "trailing" spacing."""
    if num_steps < 1:
        raise ConfigError(f"num_steps {num_steps} must be at least 1")
    return torch.linspace(t_max, t_min, num_steps + 1, dtype=torch.float64)


def draw_each(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """One N(0, I) sample a generator, on the CPU in float32, so that devices and dtypes share it."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


def initial_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(len(seeds), *shape) noise; row i is a function of seeds[i] alone."""
    return draw_each([torch.Generator().manual_seed(int(s)) for s in seeds], shape).to(device, dtype)


def averaged(model: Callable, r: float) -> Callable:
    """MeanFlow's model of (x, t, y): the velocity averaged from r to t."""
    return lambda x, t, *y: model(x, t, *y, r=torch.full_like(t, r))


class Evaluator:
    """f(x, t): the model, guided, in the dtype of x; `f.noise(x)`: fresh noise for each sample from its own seed."""

    def __init__(self, model: Callable, guidance: Callable | None, seeds: Sequence[int] | None) -> None:
        self.model, self.guidance = model, guidance
        self.generators = [torch.Generator().manual_seed(int(s) ^ NOISE_STREAM) for s in seeds or ()]

    def __call__(self, x: Tensor, t: float | Tensor, r: float | None = None) -> Tensor:
        return self.with_variance(x, t, r)[:, : x.shape[1]]

    def with_variance(self, x: Tensor, t: float | Tensor, r: float | None = None) -> Tensor:
        """All channels, those of a learned variance after the others."""
        model, guidance = self.model, self.guidance
        if r is not None:
            model = averaged(model, r)
            if isinstance(guidance, AutoGuidance) and guidance.weak_model is not None:
                guidance = dataclasses.replace(guidance, weak_model=averaged(guidance.weak_model, r))
        out = call(model, x, times(t, x), None) if guidance is None else guidance(model, x, t)
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
        return draw_each(self.generators, x.shape[1:]).to(x)


def sampler(make_step: Callable[..., Step]) -> Callable[..., Tensor]:
    """Turn `make_step(f, **options) -> step(x, t, s)` into a sampler: x = step(x, t, s) from each t to the next."""

    @torch.no_grad()
    def sample(
        model: Callable,
        x: Tensor,
        ts: Times,
        *,
        guidance: Callable | None = None,
        callback: Callback | None = None,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> Tensor:
        grid = [float(t) for t in ts]
        if len(grid) < 2 or not all(1 >= t > s >= 0 for t, s in pairwise(grid)):  # NaN is not above anything
            raise ConfigError(f"ts must fall within [0, 1], from noise to data, and begins {grid[:3]}: use time_grid")
        step = make_step(Evaluator(model, guidance, seeds), **options)
        for i, (t, s) in enumerate(pairwise(grid)):
            x = step(x, t, s)
            if callback is not None:
                callback(i, s, x)
        return x

    sample.__name__, sample.__doc__ = make_step.__name__, make_step.__doc__
    return sample


@sampler
def euler(f: Evaluator) -> Step:
    """First order, one evaluation a step."""
    return lambda x, t, s: x + (s - t) * f(x, t)


@sampler
def heun(f: Evaluator) -> Step:
    """Second order, two evaluations a step: the trapezoidal rule with an Euler predictor."""

    def step(x: Tensor, t: float, s: float) -> Tensor:
        slope = f(x, t)
        return x + (s - t) / 2 * (slope + f(x + (s - t) * slope, s))

    return step


@sampler
def rk4(f: Evaluator) -> Step:
    """Fourth order, four evaluations a step: the classical Runge-Kutta method."""

    def step(x: Tensor, t: float, s: float) -> Tensor:
        h, middle = s - t, (s + t) / 2
        k1 = f(x, t)
        k2 = f(x + h / 2 * k1, middle)
        k3 = f(x + h / 2 * k2, middle)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + f(x + h * k3, s))

    return step


def at(t: float) -> Tensor:
    """A time as a float64 scalar tensor: the path is exact, and a product with x keeps the dtype and device of x."""
    return torch.tensor(t, dtype=torch.float64)


def x0_and_eps(out: Tensor, x: Tensor, t: float, path: Path, prediction: str) -> tuple[Tensor, Tensor]:
    """Data and noise in x, from the model's output. Raises ConfigError: the path holds no data at t, and out is eps or
    score.
    """
    if prediction in ("eps", "score") and path.alpha(at(t)) < 1e-6:
        raise ConfigError(
            f"at t = {t:g} x is noise alone, from which a model of {prediction} says nothing of the data: begin at "
            "time_grid(n, t_max=1 - 1e-3)"
        )
    return path.x0_and_eps(out, x, at(t), prediction)


@sampler
def ddpm(
    f: Evaluator,
    path: Path = DDPM_LINEAR,
    prediction: str = "eps",
    variance: str = "posterior",
    clip: float | None = None,
) -> Step:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2) between any two times of any path; needs seeds.

    variance: "posterior" (the lower bound), "step" (the upper), or "learned": the model's second half of
    the channels interpolates their logarithms (arXiv 2102.09672, equation 15). clip: clamp x0 to [-clip,
    clip].
    """

    if variance not in ("posterior", "step", "learned"):
        raise ConfigError(f"unknown variance {variance!r}; there are: posterior, step, learned")

    def step(x: Tensor, t: float, s: float) -> Tensor:
        a, b, low, high = path.posterior(at(t), at(s))
        out = f.with_variance(x, t)
        if variance == "learned" and out.shape == x.shape:
            raise ConfigError('variance="learned" needs a model with learn_sigma, which has twice the channels')
        x0, _ = x0_and_eps(out, x, t, path, prediction)
        mean = a * x + b * (x0 if clip is None else x0.clamp(-clip, clip))
        if low <= 0:  # s is data: nothing left to draw
            return mean
        share = {"posterior": 0.0, "step": 1.0}.get(variance, (out[:, x.shape[1] :] + 1) / 2)
        return mean + (0.5 * (share * high.log() + (1 - share) * low.log())).exp() * f.noise(x)

    return step


@sampler
def ddim(f: Evaluator, path: Path = DDPM_LINEAR, prediction: str = "eps", eta: float = 0.0) -> Step:
    """arXiv 2010.02502, equation 12: eta = 0 is deterministic, eta = 1 (needs seeds) is ancestral sampling."""

    def step(x: Tensor, t: float, s: float) -> Tensor:
        x0, eps = x0_and_eps(f(x, t), x, t, path, prediction)
        spread = eta * path.posterior(at(t), at(s))[2].sqrt()
        x = path.alpha(at(s)) * x0 + (path.sigma(at(s)) ** 2 - spread**2).clamp(min=0).sqrt() * eps
        return x + spread * f.noise(x) if spread > 0 else x

    return step


@sampler
def dpm_solver_2m(f: Evaluator, path: Path = DDPM_LINEAR, prediction: str = "eps") -> Step:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2: second order, one evaluation a step. The first step is first
    order, and so is one that ends at the data itself.
    """
    previous: list[tuple[Tensor, Tensor]] = []  # x0 and the log-SNR step of the step before

    def step(x: Tensor, t: float, s: float) -> Tensor:
        x0, _ = x0_and_eps(f(x, t), x, t, path, prediction)
        h = (path.log_snr(at(s)) - path.log_snr(at(t))) / 2  # may be infinite at the ends
        ahead = x0
        if previous and torch.isfinite(h) and torch.isfinite(previous[0][1]):
            before, h_before = previous[0]
            ahead = x0 + (x0 - before) * (h / (2 * h_before))
        previous[:] = [(x0, h)]
        return path.sigma(at(s)) / path.sigma(at(t)) * x - path.alpha(at(s)) * torch.expm1(-h) * ahead

    return step


@sampler
def euler_maruyama(f: Evaluator, path: Path = LINEAR, prediction: str = "v", churn: float = 1.0) -> Step:
    """The reverse SDE with diffusion w(t) = churn * sigma(t), SiT's equation 5 and its default; needs
    seeds.

    x_s = x - h (v - w score / 2) + sqrt(w h) z with h = t - s; the last step, to the data, adds no noise.
    churn=0 is Euler.
    """

    def step(x: Tensor, t: float, s: float) -> Tensor:
        h = t - s
        x0, eps = x0_and_eps(f(x, t), x, t, path, prediction)
        drift = path.velocity(x0, eps, at(t))
        if s <= path.t_min:
            return x - h * drift
        w = churn * path.sigma(at(t))
        return x - h * (drift + churn / 2 * eps) + (w * h).sqrt() * f.noise(x)  # w score = -churn eps

    return step


@sampler
def meanflow(f: Evaluator) -> Step:
    """x_s = x - (t - s) u(x, r=s, t), MeanFlow's equation 12 (arXiv 2505.13447): exact in one step if u is."""
    return lambda x, t, s: x - (t - s) * f(x, t, r=s)


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


@sampler
def dopri5(f: Evaluator, rtol: float = 1e-5, atol: float = 1e-5, max_steps: int = 1000) -> Step:
    """Adaptive fifth order from each time to the next, so ts = [1, 0] leaves every step to it.

    Each sample has a step size of its own, and does not depend on its neighbours. Raises ConfigError after
    max_steps.
    """

    def step(x: Tensor, start: float, end: float) -> Tensor:
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
                raise ConfigError(f"dopri5 met NaN or infinity near t = {float(t.min()):.3g}: the model returned it")
            taken = size <= 1
            x, slope = torch.where(expand(taken, x), x_new, x), torch.where(expand(taken, x), ks[-1], slope)
            t = torch.where(taken, torch.where(h <= end - t, end, t + h), t)
            if bool((t <= end).all()):
                return x
            h = h * (0.9 * size.clamp(min=1e-10) ** -0.2).clamp(0.2, 10.0)
        raise ConfigError(f"dopri5 is at t = {float(t.max()):.3g} after {max_steps} steps: raise rtol or max_steps")

    return step
