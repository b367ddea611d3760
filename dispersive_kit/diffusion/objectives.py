"""Training objectives with one interface: `loss, aux = objective(model, x0, y, draws=..., taps=...)`.

Every random number is in `draws`, so a training loop can draw the global batch once and give each process
its slice. The model is any callable `model(x_t, t, y)`; the caller drops labels, for guidance.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from dispersive_kit.diffusion.paths import DDPM_LINEAR, LINEAR, DDPMPath, Path, check_prediction, expand
from dispersive_kit.errors import ConfigError


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch: times t and r (B,), noise eps shaped as x0; `draws[a:b]` selects samples."""

    t: Tensor
    eps: Tensor
    r: Tensor | None = None

    def __getitem__(self, index: Any) -> "Draws":
        return Draws(self.t[index], self.eps[index], None if self.r is None else self.r[index])


@dataclass(frozen=True)
class Aux:
    """Returned with the loss: t (B,); per_sample (B,), the unweighted losses, detached; taps, with gradient."""

    t: Tensor
    per_sample: Tensor
    taps: tuple[Tensor, ...] = ()


LossAndAux = tuple[Tensor, Aux]


def _noise_like(x0: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x0.shape, generator=generator, device=generator.device, dtype=x0.dtype).to(x0.device)


def _draw_times(x0: Tensor, generator: torch.Generator, how: str, t_min: float, mean: float = 0.0) -> Tensor:
    """(B,) times: uniform on [t_min, 1], or the logistic of N(mean, 1) (arXiv 2403.03206, section 3.1).

    They, and all that is computed from them, are float32 or float64: bf16 has only 128 numbers between 1/2 and 1.
    """
    dtype = torch.promote_types(x0.dtype, torch.float32)
    if how == "uniform":
        t = torch.rand(x0.shape[0], generator=generator, device=generator.device, dtype=dtype)
    elif how == "logit_normal":
        normal = torch.randn(x0.shape[0], generator=generator, device=generator.device, dtype=dtype)
        t = torch.sigmoid(mean + normal)
    else:
        raise ConfigError(f"t_sampling {how!r} is unknown: it is 'uniform' or 'logit_normal'")
    return (t_min + (1 - t_min) * t).to(x0.device)


def _predict(
    model: Callable, x: Tensor, t: Tensor, y: Tensor | None, taps: Sequence[int], channels: int, **times: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The model's output with its channels checked, and its taps; `taps` is an argument only if it is not empty."""
    args = (x, t) if y is None else (x, t, y)
    out = model(*args, taps=tuple(taps), **times) if taps else model(*args, **times)
    out, kept = out if taps else (out, ())
    if out.shape != (x.shape[0], channels, *x.shape[2:]):
        raise ConfigError(
            f"the objective expects {channels} channels for data {tuple(x.shape)}, and the model returned "
            f"{tuple(out.shape)}: learn_sigma of the model and of the objective must agree"
        )
    return out, tuple(kept)


class Objective(ABC):
    """`draw(x0, generator)` returns the random numbers of a batch; the loss is a function of them."""

    path: Path

    @abstractmethod
    def draw(self, x0: Tensor, generator: torch.Generator) -> Draws: ...

    @abstractmethod
    def loss(self, model: Callable, x0: Tensor, y: Tensor | None, draws: Draws, taps: Sequence[int]) -> LossAndAux: ...

    def __call__(
        self,
        model: Callable,
        x0: Tensor,
        y: Tensor | None = None,
        *,
        draws: Draws | None = None,
        generator: torch.Generator | None = None,
        taps: Sequence[int] = (),
    ) -> tuple[Tensor, Aux]:
        """The scalar loss and its `Aux`; taps are block indices for models that return them (x0 (B, ...), y (B,))."""
        if draws is None:
            if generator is None:
                raise ConfigError("an objective never uses the global generator: give draws= or generator=")
            draws = self.draw(x0, generator)
        return self.loss(model, x0, y, draws, taps)


@dataclass(frozen=True)
class FlowMatching(Objective):
    """Mean squared error of a prediction about x_t. "v" on the linear path is SiT's and rectified flow's objective.

    prediction: "v", "x0", "eps", or "score", weighted by sigma^2 (denoising score matching), since it is unbounded.
    t_sampling: "uniform" or "logit_normal".
    """

    path: Path = LINEAR
    prediction: str = "v"
    t_sampling: str = "uniform"

    def __post_init__(self) -> None:
        check_prediction(self.prediction)

    def draw(self, x0: Tensor, generator: torch.Generator) -> Draws:
        t = _draw_times(x0, generator, self.t_sampling, self.path.t_min)
        return Draws(t=t, eps=_noise_like(x0, generator))

    def loss(self, model: Callable, x0: Tensor, y: Tensor | None, draws: Draws, taps: Sequence[int]) -> LossAndAux:
        t, eps = draws.t, draws.eps
        pred, kept = _predict(model, self.path.x_t(x0, eps, t).to(x0.dtype), t, y, taps, x0.shape[1])
        pred, targets = pred.to(t.dtype), {"v": self.path.velocity(x0, eps, t), "x0": x0, "eps": eps, "score": -eps}
        if self.prediction == "score":  # it is unbounded near the data
            pred = pred * self.path.sigma(expand(t, pred))
        per_sample = (pred - targets[self.prediction]).square().flatten(1).mean(1)  # (B,)
        return per_sample.mean(), Aux(t=t, per_sample=per_sample.detach(), taps=kept)


@dataclass(frozen=True)
class DDPM(Objective):
    """Ho et al. (arXiv 2006.11239, equation 14), the "simple" loss on eps; with learn_sigma Nichol & Dhariwal's hybrid.

    learn_sigma: the model returns 2C channels. The second half, in [-1, 1], interpolates the log variance between
    its bounds, and only this half is trained by the variational bound, in bits per dimension (arXiv 2102.09672,
    equations 15 and 16; the weight 0.001 there times T = 1000 timesteps is 1 here, as in DiT).
    """

    path: DDPMPath = DDPM_LINEAR
    learn_sigma: bool = False

    def draw(self, x0: Tensor, generator: torch.Generator) -> Draws:
        T = self.path.num_timesteps
        k = torch.randint(T, (x0.shape[0],), generator=generator, device=generator.device)
        t = (k + 1).to(x0.device, torch.promote_types(x0.dtype, torch.float32)) / T
        return Draws(t=t, eps=_noise_like(x0, generator))

    def loss(self, model: Callable, x0: Tensor, y: Tensor | None, draws: Draws, taps: Sequence[int]) -> LossAndAux:
        t, eps, C = draws.t, draws.eps, x0.shape[1]
        x = self.path.x_t(x0, eps, t)
        out, kept = _predict(model, x.to(x0.dtype), t, y, taps, 2 * C if self.learn_sigma else C)
        out = out.to(x.dtype)
        per_sample = ((out[:, :C] - eps) ** 2).flatten(1).mean(1)  # (B,)
        loss = per_sample
        if self.learn_sigma:
            loss = loss + self._variational_bound(x0, x, t, out[:, :C].detach(), out[:, C:])
        return loss.mean(), Aux(t=t, per_sample=per_sample.detach(), taps=kept)

    def _variational_bound(self, x0: Tensor, x: Tensor, t: Tensor, eps: Tensor, share: Tensor) -> Tensor:
        """One term of the bound (B,) in bits per dimension: a KL of Gaussians; at t = 1 / T, -log likelihood."""
        T = self.path.num_timesteps
        t = expand(t, x)
        a, b, _, step_var = self.path.posterior(t, t - 1 / T)
        # At t = 1 / T the posterior variance is 0: that of t = 2 / T is used instead (arXiv 2102.09672, 3.1).
        late = t.clamp(min=2 / T)
        low = self.path.posterior(late, late - 1 / T)[2].log()
        log_var = (share + 1) / 2 * step_var.log() + (1 - share) / 2 * low
        x0_pred, _ = self.path.x0_and_eps(eps, x, t, "eps")
        mean = a * x + b * x0_pred
        kl = 0.5 * (log_var - low - 1 + (low - log_var).exp() + (b * (x0 - x0_pred)) ** 2 * (-log_var).exp())
        nll = -_discretized_log_likelihood(x0, mean, (0.5 * log_var).exp())
        return torch.where(t < 1.5 / T, nll, kl).flatten(1).mean(1) / math.log(2)


def _discretized_log_likelihood(x0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log of the Gaussian mass in the grey level of x0, pixels in [-1, 1] with 256 levels (DDPM's equation 13)."""
    upper = torch.special.ndtr((x0 - mean + 1 / 255) / std)
    lower = torch.special.ndtr((x0 - mean - 1 / 255) / std)
    upper = torch.where(x0 > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x0 < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()


@dataclass(frozen=True)
class MeanFlow(Objective):
    """u(x_t, r, t) = 1/(t - r) times the integral of v from r to t, from the identity u = v - (t - r) du/dt.

    The model is called as model(x, t, y, r=r). The time derivative is a Jacobian-vector product, so the
    model must allow forward-mode differentiation (no activation checkpointing); the taps are returned by
    has_aux, with their gradient. Under DDP give the wrapped model, whose forward pass prepares the reduction.

    equal_share: share of the samples with r = t. power: weight 1 / (|error|^2 + 1e-3)^power, the error summed over the
    dimensions. Logit-normal times have mean -0.4 before the logistic, as published.
    """

    path: Path = LINEAR
    equal_share: float = 0.75
    t_sampling: str = "logit_normal"
    power: float = 1.0

    def draw(self, x0: Tensor, generator: torch.Generator) -> Draws:
        pair = [_draw_times(x0, generator, self.t_sampling, self.path.t_min, mean=-0.4) for _ in range(2)]
        t, r = torch.maximum(pair[0], pair[1]), torch.minimum(pair[0], pair[1])
        equal = torch.rand(t.shape, generator=generator, device=generator.device).to(t.device) < self.equal_share
        return Draws(t=t, r=torch.where(equal, t, r), eps=_noise_like(x0, generator))

    def loss(self, model: Callable, x0: Tensor, y: Tensor | None, draws: Draws, taps: Sequence[int]) -> LossAndAux:
        t, r, eps = draws.t, draws.r, draws.eps
        if r is None:
            raise ConfigError("MeanFlow needs draws with r: use MeanFlow.draw")
        x = self.path.x_t(x0, eps, t)
        # DDP rebuilds its buckets in its second forward pass, which fails inside jvp: do it here.
        if isinstance(model, DistributedDataParallel):
            model.reducer._rebuild_buckets()
        v = self.path.velocity(x0, eps, t)

        def u(x: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            return _predict(model, x.to(x0.dtype), t, y, taps, x.shape[1], r=r)

        # The fused attention kernels have no forward-mode derivative; the MATH backend has one.
        with sdpa_kernel(SDPBackend.MATH):
            tangents = (v, torch.ones_like(t), torch.zeros_like(r))
            out, du_dt, kept = torch.func.jvp(u, (x, t, r), tangents, has_aux=True)  # type: ignore[misc]
        target = (v - expand(t - r, x) * du_dt).detach()
        error = (out.to(x.dtype) - target).square().flatten(1)  # (B, dim)
        squared = error.sum(1)
        weight = (squared.detach() + 1e-3) ** -self.power
        return (weight * squared).mean(), Aux(t=t, per_sample=error.mean(1).detach(), taps=kept)
