"""Distances between two sets of features (N, D), in float64."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dispersive_kit.errors import ConfigError

Array = NDArray[np.float64]


Fit = tuple[Array, Array]  # mean (D,) and a factor A (at most D rows) with A^T A = covariance


def frechet_distance(x: NDArray, y: NDArray) -> float:
    """Squared Frechet distance of the Gaussians fitted to x (N, D) and y (M, D).

    |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2)   (Dowson & Landau 1982; Heusel et al., arXiv 1706.08500)

    With A, B the centred features over sqrt(n - 1), the last trace is the nuclear norm of A B^T: real by construction,
    exact for n < D, and no matrix square root. For n > D the triangular factors of A and B stand in for them.

    Raises:
        ConfigError: fewer than two rows, different D, or values that are not finite.
    """
    x, y = checked_pair(x, y)
    return _between(_fit(x), _fit(y))


def _fit(x: Array) -> Fit:
    mean = x.mean(0)
    scaled = (x - mean) / np.sqrt(len(x) - 1)
    return mean, np.asarray(np.linalg.qr(scaled, mode="r")) if len(scaled) > scaled.shape[1] else scaled


def _between(x: Fit, y: Fit) -> float:
    (mean_x, a), (mean_y, b) = x, y
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((mean_x - mean_y) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)


def checked(x: NDArray) -> Array:
    """Features (N, D) in float64.

    Raises:
        ConfigError: not (N, D) with N >= 2, or values that are not finite.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ConfigError(f"features must be (N, D) with N >= 2, got {x.shape}")
    if not np.isfinite(x).all():
        raise ConfigError("the features hold NaN or infinite values; look at the images they came from")
    return x


def checked_pair(x: NDArray, y: NDArray) -> tuple[Array, Array]:
    """Two sets of features of one extractor, in float64. Raises ConfigError: as `checked`, or different D."""
    x, y = checked(x), checked(y)
    if x.shape[1] != y.shape[1]:
        raise ConfigError(f"the two sets have {x.shape[1]} and {y.shape[1]} features; use one extractor for both")
    return x, y


@dataclass(frozen=True)
class Interval:
    """A value and the central 95 % of its resamples."""

    value: float
    low: float
    high: float

    @classmethod
    def around(cls, value: float, halves: Array) -> "Interval":
        """From the value of all samples and those of its half-samples (R,); no half-samples give NaN as the ends.

        The deviations of the halves from their own mean are taken as they are (for m = N / 2 of N without
        replacement the two spreads are of one size) and set around the value. Where x and y are of one law, a distance
        is quadratic in the sampling error, and the interval is up to 3^(1/2) times too wide.
        """
        if not len(halves):
            return cls(value, float("nan"), float("nan"))
        low, high = np.percentile(halves - halves.mean(), [2.5, 97.5])
        return cls(value, float(value + low), float(value + high))


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share among n images: not empty at 0 or 1, as that of half-samples is."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def half_samples(n: int, resamples: int = 100, *, seed: int = 0) -> NDArray[np.bool_]:
    """Which of n samples are in each random half, without replacement (R, n): a bootstrap's ties would add a bias."""
    rng, halves = np.random.default_rng(seed), np.zeros((resamples, n), dtype=bool)
    for row in halves:
        row[rng.permutation(n)[: n // 2]] = True
    return halves


def frechet_halves(x: NDArray, y: NDArray, halves: NDArray[np.bool_]) -> tuple[float, Array]:
    """Frechet distance of x (N, D) to y (M, D), and its value on halves of x (R, N)."""
    x, y = checked_pair(x, y)
    reference = _fit(y)
    return _between(_fit(x), reference), np.array([_between(_fit(x[half]), reference) for half in halves])


def frechet_interval(x: NDArray, y: NDArray, *, resamples: int = 100, seed: int = 0) -> Interval:
    """Frechet distance of x (generated) to y (reference), with the spread it has over half-samples of x.

    It covers the sampling of x only: not the training seed, which moves more.
    """
    return Interval.around(*frechet_halves(x, y, half_samples(len(x), resamples, seed=seed)))


def psnr(x: NDArray, y: NDArray) -> Array:
    """Peak signal-to-noise ratio (N,) in dB of uint8 images (N, C, H, W) against others: 10 log10(255^2 / MSE)."""
    error = np.square(np.asarray(x, dtype=np.float64) - np.asarray(y, dtype=np.float64)).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-12))
