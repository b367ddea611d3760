"""Training objectives with one interface: `loss, aux = objective(model, x0, y, draws=..., taps=...)`.

Every random number is in `draws`, so a training loop can draw the global batch once and give each process
its slice. The model is any callable `model(x_t, t, y)`; labels are dropped by whoever calls the objective.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .paths import LinearPath, Path, check_prediction, expand


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch, first axis the sample: times t and r (B,), noise eps like x0.
    `draws[a:b]` slices.
    """

    t: Tensor
    eps: Tensor
    r: Tensor | None = None

    def __getitem__(self, index: Any) -> "Draws":
        return Draws(self.t[index], self.eps[index], None if self.r is None else self.r[index])


@dataclass(frozen=True)
class Aux:
    """What an objective saw: t (B,); per_sample (B,), the unweighted loss of each sample, detached; taps,
    with gradient.
    """

    t: Tensor
    per_sample: Tensor
    taps: tuple[Tensor, ...] = ()


def noise_like(x0: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x0.shape, generator=generator, device=generator.device, dtype=x0.dtype).to(x0.device)


def draw_times(
    x0: Tensor, generator: torch.Generator, how: str, t_min: float, mean: float, std: float
) -> Tensor:
    """(B,) times: uniform on [t_min, 1], or the logistic of a Gaussian (arXiv 2403.03206, section 3.1)."""
    if how == "uniform":
        t = torch.rand(x0.shape[0], generator=generator, device=generator.device, dtype=x0.dtype)
    elif how == "logit_normal":
        normal = torch.randn(x0.shape[0], generator=generator, device=generator.device, dtype=x0.dtype)
        t = torch.sigmoid(mean + std * normal)
    else:
        raise ConfigError(f"t_sampling {how!r} is unknown: it is 'uniform' or 'logit_normal'")
    return (t_min + (1 - t_min) * t).to(x0.device)


def predict(
    model: Callable,
    x: Tensor,
    t: Tensor,
    y: Tensor | None,
    taps: Sequence[int],
    channels: int,
    **times: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The model's output with its channels checked, and its taps; models that know no taps are never asked
    for them.
    """
    args = (x, t) if y is None else (x, t, y)
    out = model(*args, taps=tuple(taps), **times) if taps else model(*args, **times)
    out, kept = out if taps else (out, ())
    if out.shape != (x.shape[0], channels, *x.shape[2:]):
        raise ConfigError(
            f"the objective expects {channels} channels for data {tuple(x.shape)}, and the model returned "
            f"{tuple(out.shape)}: learn_sigma of the model and of the objective must agree"
        )
    return out, tuple(kept)


def mean_flat(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def given_or_drawn(
    objective: Any, x0: Tensor, draws: Draws | None, generator: torch.Generator | None
) -> Draws:
    if draws is None and generator is None:
        raise ConfigError("an objective draws nothing from the global generator: give draws= or generator=")
    return objective.draw(x0, generator) if draws is None else draws


@dataclass(frozen=True)
class FlowMatching:
    """Mean squared error of a prediction about x_t. "v" on the linear path is SiT's and rectified flow's
    objective.

    prediction: "v", "x0", "eps", or "score", which is weighted by sigma^2 (denoising score matching), being
    unbounded.
    t_sampling: "uniform" or "logit_normal" with `logit_mean`, `logit_std`.
    """

    path: Path = field(default_factory=LinearPath)
    prediction: str = "v"
    t_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        check_prediction(self.prediction)

    def draw(self, x0: Tensor, generator: torch.Generator) -> Draws:
        t = draw_times(x0, generator, self.t_sampling, self.path.t_min, self.logit_mean, self.logit_std)
        return Draws(t=t, eps=noise_like(x0, generator))

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
        draws = given_or_drawn(self, x0, draws, generator)
        t, eps = draws.t, draws.eps
        pred, kept = predict(model, self.path.x_t(x0, eps, t), t, y, taps, x0.shape[1])
        per_sample = mean_flat((self.scaled(pred, t) - self.target(x0, eps, t)) ** 2)  # (B,)
        return per_sample.mean(), Aux(t=t, per_sample=per_sample.detach(), taps=kept)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "v":
            return self.path.velocity(x0, eps, t)
        return {"x0": x0, "eps": eps, "score": -eps}[self.prediction]

    def scaled(self, pred: Tensor, t: Tensor) -> Tensor:
        return pred * self.path.sigma(expand(t, pred)) if self.prediction == "score" else pred.to(t.dtype)
