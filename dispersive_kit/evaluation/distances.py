"""Distances between two sets of features (N, D), in float64."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dispersive_kit.errors import ConfigError

Array = NDArray[np.float64]


def frechet_distance(x: NDArray, y: NDArray) -> float:
    """Squared Frechet distance of the Gaussians fitted to x (N, D) and y (M, D).

    |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2)   (Dowson & Landau 1982; Heusel et al., arXiv 1706.08500)

    With A, B the centred features over sqrt(n - 1), the last trace is the nuclear norm of A B^T: real by construction,
    exact for n < D, and no matrix square root. For n > D the triangular factors of A and B stand in for them.

    Raises:
        ConfigError: fewer than two rows, different D, or values that are not finite.
    """
    x, y = _checked(x), _checked(y)
    if x.shape[1] != y.shape[1]:
        raise ConfigError(f"the two sets have {x.shape[1]} and {y.shape[1]} features; use one extractor for both")
    mean_x, mean_y = x.mean(0), y.mean(0)
    a, b = _factor(x - mean_x), _factor(y - mean_y)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((mean_x - mean_y) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)


def _factor(centred: Array) -> Array:
    """A matrix with at most D rows and the same Gram matrix A^T A = S as the scaled rows."""
    scaled = centred / np.sqrt(len(centred) - 1)
    return np.asarray(np.linalg.qr(scaled, mode="r")) if len(scaled) > scaled.shape[1] else scaled


def _checked(x: NDArray) -> Array:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ConfigError(f"features must be (N, D) with N >= 2, got {x.shape}")
    if not np.isfinite(x).all():
        raise ConfigError("the features hold NaN or infinite values; look at the images they came from")
    return x


@dataclass(frozen=True)
class Interval:
    """A value and the central 95 % of its resamples."""

    value: float
    low: float
    high: float


def frechet_interval(x: NDArray, y: NDArray, *, resamples: int = 100, seed: int = 0) -> Interval:
    """Frechet distance of x (generated) to y (reference), with the spread it has over half-samples of x.

    Half-samples without replacement, because a bootstrap's ties shift the distance upwards; their deviations from
    their own mean are taken as they are (for m = N / 2 of N the two are of one size) and set around the value.
    It covers the sampling of x only: not the training seed, which moves more.
    """
    value = frechet_distance(x, y)
    rng, half = np.random.default_rng(seed), len(x) // 2
    halves = [frechet_distance(x[rng.permutation(len(x))[:half]], y) for _ in range(resamples)]
    low, high = np.percentile(np.array(halves) - np.mean(halves), [2.5, 97.5])
    return Interval(value, value + low, value + high)


def psnr(x: NDArray, y: NDArray) -> Array:
    """Peak signal-to-noise ratio (N,) in dB of uint8 images (N, C, H, W) against others: 10 log10(255^2 / MSE)."""
    error = np.square(np.asarray(x, dtype=np.float64) - np.asarray(y, dtype=np.float64)).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-12))
