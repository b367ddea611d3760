"""Paths from data to noise, x_t = alpha(t) x0 + sigma(t) eps with t = 0 data and t = 1 noise, and what can
be read off x_t.

x0, eps, velocity v = dx_t/dt and score = grad log p_t(x_t) each determine the others (SiT, arXiv
2401.08740, section 2).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dispersive_kit.errors import ConfigError

PREDICTIONS = ("x0", "eps", "v", "score")


def expand(t: Tensor, x: Tensor) -> Tensor:
    """A per-sample number (B,) as (B, 1, ...), ready to multiply x."""
    return t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t


class Path(ABC):
    """alpha, sigma and their derivatives as functions of t (any shape); everything else follows from them."""

    t_min = 0.0  # smallest time at which the velocity is finite

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(alpha, sigma, d_alpha, d_sigma) at t; the one method of a subclass."""

    def alpha(self, t: Tensor) -> Tensor:
        return self.coefficients(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self.coefficients(t)[1]

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def x_t(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma, _, _ = self.coefficients(expand(t, x0))
        return alpha * x0 + sigma * eps

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        _, _, d_alpha, d_sigma = self.coefficients(expand(t, x0))
        return d_alpha * x0 + d_sigma * eps

    def x0_and_eps(self, pred: Tensor, x: Tensor, t: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
        """Solve x = alpha x0 + sigma eps with what the prediction says; a learned variance is dropped."""
        t, pred = expand(t, x), pred[:, : x.shape[1]]
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t)
        if prediction == "x0":
            return pred, (x - alpha * pred) / sigma
        if prediction == "eps":
            return (x - sigma * pred) / alpha, pred
        if prediction == "score":
            return (x + sigma**2 * pred) / alpha, -sigma * pred
        check_prediction(prediction)
        det = alpha * d_sigma - d_alpha * sigma
        return (d_sigma * x - sigma * pred) / det, (alpha * pred - d_alpha * x) / det

    def posterior(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q(x_s | x_t, x0) for s < t: mean = a x_t + b x0 and var; (a, b, var, var of x_t given x_s).

        DDPM's equations 6 and 7 (arXiv 2006.11239), for any path and any two times.
        """
        ratio = self.alpha(t) / self.alpha(s)
        step_var = self.sigma(t) ** 2 - ratio**2 * self.sigma(s) ** 2
        keep = self.sigma(s) ** 2 / self.sigma(t) ** 2
        return ratio * keep, self.alpha(s) * step_var / self.sigma(t) ** 2, step_var * keep, step_var

    def convert(self, pred: Tensor, x: Tensor, t: Tensor, prediction: str, to: str) -> Tensor:
        """A prediction about x (B, ...) at t (B,), as another: both of "x0", "eps", "v", "score".

        Non-finite where the path itself has no answer: eps -> x0 at alpha = 0, x0 -> eps and anything ->
        score at sigma = 0.
        """
        check_prediction(to)
        if prediction == to:
            return pred
        x0, eps = self.x0_and_eps(pred, x, t, prediction)
        return {
            "x0": lambda: x0,
            "eps": lambda: eps,
            "v": lambda: self.velocity(x0, eps, t),
            "score": lambda: -eps / self.sigma(expand(t, x)),
        }[to]()


def check_prediction(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ConfigError(f"prediction {prediction!r} is unknown: it is one of {', '.join(PREDICTIONS)}")


@dataclass(frozen=True)
class LinearPath(Path):
    """alpha = 1 - t, sigma = t: rectified flow, the default of SiT."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class GVPPath(Path):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the generalised variance-preserving path of SiT."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cos, sin = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
        return cos, sin, -math.pi / 2 * sin, math.pi / 2 * cos


def _variance_preserving(log_alpha: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The coefficients with sigma^2 = 1 - alpha^2, from log alpha and its derivative."""
    alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    return alpha, sigma, slope * alpha, -slope * alpha**2 / sigma


@dataclass(frozen=True)
class VPPath(Path):
    """The continuous VP path of Song et al. (arXiv 2011.13456, equation 33): beta rises linearly in t."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min = 1e-5  # sigma grows like a square root: its derivative is infinite at 0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rise = self.beta_max - self.beta_min
        return _variance_preserving(-(t**2) * rise / 4 - t * self.beta_min / 2, -t * rise / 2 - self.beta_min / 2)


@lru_cache
def _ddpm_log_alpha(schedule: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """log alpha at t = 0, 1/T, ..., 1 (T + 1,), half the log of DDPM's cumulative product, and its slopes there."""
    if schedule == "linear":  # Ho et al., arXiv 2006.11239
        beta = torch.linspace(1e-4, 0.02, DDPMPath.num_timesteps, dtype=torch.float64)
    else:  # cosine: Nichol & Dhariwal, arXiv 2102.09672, equation 17
        k = torch.arange(DDPMPath.num_timesteps + 1, dtype=torch.float64) / DDPMPath.num_timesteps
        alpha_bar = torch.cos((k + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    table = torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-beta).cumsum(0) / 2])
    rise = table.diff()
    steep = 3 * torch.maximum(rise[1:], rise[:-1])  # both negative: a steeper slope would overshoot
    slope = torch.cat([rise[:1], torch.maximum((rise[1:] + rise[:-1]) / 2, steep), rise[-1:]])
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return table.to(device, dtype), slope.to(device, dtype)


@dataclass(frozen=True)
class DDPMPath(Path):
    """The discrete schedule of DDPM and DiT, "linear" or "cosine"; timestep k of the papers is t = (k + 1) / 1000.

    So t = 0 is data. Between the timesteps log alpha is a monotone cubic (Fritsch & Carlson 1980), which
    gives the ODE samplers a continuous velocity.
    """

    schedule: str = "linear"
    num_timesteps = 1000
    t_min = 1e-5

    def __post_init__(self) -> None:
        if self.schedule not in ("linear", "cosine"):
            raise ConfigError(f"schedule {self.schedule!r} is unknown: it is 'linear' or 'cosine'")

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        table, slope = _ddpm_log_alpha(self.schedule, t.device)
        position = (t.to(table.dtype) * self.num_timesteps).clamp(0, self.num_timesteps)
        k = position.long().clamp(max=self.num_timesteps - 1)
        u, left, right, rise = position - k, slope[k], slope[k + 1], table[k + 1] - table[k]
        bend, twist = 3 * rise - 2 * left - right, left + right - 2 * rise
        log_alpha = table[k] + u * (left + u * (bend + u * twist))
        d_log_alpha = (left + u * (2 * bend + u * 3 * twist)) * self.num_timesteps
        return _variance_preserving(log_alpha.to(t.dtype), d_log_alpha.to(t.dtype))


LINEAR, DDPM_LINEAR = LinearPath(), DDPMPath()  # the defaults of objectives and samplers
