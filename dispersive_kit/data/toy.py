"""Generated 2-D sets: points (n, 2) in about [-2, 2]^2 and their class (n,).

`GaussianMixture` also knows its own exact denoiser, so a trained network can be compared with the exact answer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dispersive_kit.errors import DataError


@dataclass(frozen=True)
class GaussianMixture:
    """Equal-weight mixture of isotropic Gaussians: K means (K, D) and one standard deviation."""

    means: Tensor
    std: float

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw x (n, D) and the component each point came from (n,)."""
        y = torch.randint(len(self.means), (n,), generator=generator)
        return self.means[y] + self.std * torch.randn(n, self.means.shape[1], generator=generator), y

    def posterior_mean(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t] for x_t = alpha x0 + sigma eps, exactly.

        Given component k, x_t is N(alpha m_k, v I) with v = alpha^2 std^2 + sigma^2, and the mean of x0 is
        m_k + (alpha std^2 / v)(x_t - alpha m_k); the components are mixed by their posterior probabilities.
        x_t: (B, D); alpha, sigma: (B,) or scalars.
        """
        alpha, sigma = (torch.as_tensor(c, dtype=x_t.dtype, device=x_t.device).reshape(-1, 1) for c in (alpha, sigma))
        variance = alpha**2 * self.std**2 + sigma**2  # (B or 1, 1)
        means = self.means.to(x_t)
        offset = x_t[:, None] - alpha[..., None] * means  # (B, K, D)
        weight = torch.softmax(-offset.square().sum(-1) / (2 * variance), dim=-1)  # (B, K)
        component = means + (alpha * self.std**2 / variance)[..., None] * offset  # (B, K, D)
        return (weight[..., None] * component).sum(1)


def eight_gaussians(std: float = 0.15, radius: float = 1.5) -> GaussianMixture:
    """Eight Gaussians on a circle."""
    angle = torch.arange(8) * (2 * math.pi / 8)
    return GaussianMixture(radius * torch.stack([angle.cos(), angle.sin()], 1), std)


def _two_moons(n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    y = torch.randint(2, (n,), generator=generator)
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    x = torch.where(y[:, None] == 0, upper, lower) - torch.tensor([0.5, 0.25])
    return 1.2 * x + 0.08 * torch.randn(n, 2, generator=generator), y


def _checkerboard(n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    column = torch.randint(4, (n,), generator=generator)
    row = 2 * torch.randint(2, (n,), generator=generator) + column % 2
    return torch.stack([column, row], 1).float() - 2 + torch.rand(n, 2, generator=generator), column % 2


def _spirals(n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    y = torch.randint(2, (n,), generator=generator)
    radius = torch.rand(n, generator=generator).sqrt()
    angle = 3 * math.pi * radius + math.pi * y
    x = 2 * radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return x + 0.05 * torch.randn(n, 2, generator=generator), y


TOY_SETS: dict[str, Callable[[int, torch.Generator | None], tuple[Tensor, Tensor]]] = {
    "eight-gaussians": lambda n, generator: eight_gaussians().sample(n, generator),
    "two-moons": _two_moons,
    "checkerboard": _checkerboard,
    "spirals": _spirals,
}


def sample_toy(name: str, n: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw n points of the 2-D set `name`: x float32 (n, 2) and class y int64 (n,); DataError for an unknown name."""
    if name not in TOY_SETS:
        raise DataError(f"unknown 2-D set {name!r}; there are: {', '.join(TOY_SETS)}")
    return TOY_SETS[name](n, torch.Generator().manual_seed(seed))
