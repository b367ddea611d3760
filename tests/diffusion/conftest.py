"""A Gaussian target N(0, data_std^2), for which every quantity of every path has a closed form."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dispersive_kit.diffusion.paths import DDPMPath, GVPPath, LinearPath, Path, VPPath, expand

PATHS = {"linear": LinearPath(), "gvp": GVPPath(), "vp": VPPath(), "ddpm": DDPMPath()}
PATHS["ddpm-cosine"] = DDPMPath("cosine")


@dataclass(frozen=True)
class Gaussian:
    """x_t is N(0, std(t)^2) and everything is linear in x: x0, eps and v are their correlation with x over its
    variance.
    """

    path: Path
    data_std: float = 0.5

    def std(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return (self.path.alpha(t) ** 2 * self.data_std**2 + self.path.sigma(t) ** 2).sqrt()

    def slope(self, t: Tensor, kind: str) -> Tensor:
        """E[kind | x_t] / x_t."""
        alpha, sigma, d_alpha, d_sigma = self.path.coefficients(t)
        variance, data = alpha**2 * self.data_std**2 + sigma**2, self.data_std**2
        of = {"x0": alpha * data, "eps": sigma, "v": alpha * d_alpha * data + sigma * d_sigma, "score": -1}
        return of[kind] / variance

    def model(self, kind: str):
        return lambda x, t, y=None: self.slope(expand(t.to(x.dtype), x), kind) * x

    def flow(self, x: Tensor, start: float, end: float) -> Tensor:
        """Where the probability-flow ODE takes x from time `start` to `end`: all of it keeps its quantile."""
        return x * (self.std(end) / self.std(start))


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


@pytest.fixture
def gaussian(path):
    return Gaussian(path)


@pytest.fixture
def gaussian_of():
    return Gaussian


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
