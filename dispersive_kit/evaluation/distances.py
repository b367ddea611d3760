"""Measures of two sets of features (N, D), in float64, each with its 95 % interval where it has one.

A distance between rows is a sum of squared differences, not made from a Gram matrix: equal points have distance
exactly 0, and a distance has the same bits in every chunk. A comparison `<=` with a radius needs both.
"""

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dispersive_kit.data.files import file_sha256
from dispersive_kit.errors import ConfigError, DataError

Array = NDArray[np.float64]
Measured = tuple[float, float, float]  # value, and the ends of its 95 % interval: NaN where there is none
Gaussian = tuple[Array, Array]  # mean (D,), and a factor A (at most D rows) with A^T A = covariance

CHUNK = 512  # rows of a matrix of pairs held at once
NO_INTERVAL = (math.nan, math.nan)


def _checked(*sets: NDArray) -> list[Array]:
    """Sets of features (N, D) of one extractor, in float64, or ConfigError."""
    found = [np.asarray(x, dtype=np.float64) for x in sets]
    for x in found:
        if x.ndim != 2 or len(x) < 2:
            raise ConfigError(f"features must be (N, D) with N >= 2, got {x.shape}")
        if not np.isfinite(x).all():
            raise ConfigError("the features hold NaN or infinite values; look at the images they came from")
    if len(widths := dict.fromkeys(x.shape[1] for x in found)) > 1:
        raise ConfigError(f"the sets have {' and '.join(map(str, widths))} features; use one extractor for both")
    return found


def half_samples(n: int, resamples: int) -> NDArray[np.bool_]:
    """Masks (R, n) of random halves of n samples, drawn without replacement: repeated samples would add a bias."""
    rng = np.random.default_rng(0)
    return np.array([rng.permutation(n).argsort() < n // 2 for _ in range(resamples)], dtype=bool).reshape(-1, n)


def interval(value: float, halves: Iterable[float]) -> tuple[float, float]:
    """Ends of the 95 % interval, from the value of all samples and the values of half-samples (R,).

    The deviations of the half-samples from their mean are added to the value without scaling: for N / 2 of N without
    replacement, both spreads are equal. If x and y have the same distribution, a distance is quadratic in the sampling
    error, and the interval is up to 3^(1/2) times too wide.
    """
    if not len(found := np.array(list(halves))):
        return NO_INTERVAL
    low, high = np.percentile(found - found.mean(), [2.5, 97.5])
    return float(value + low), float(value + high)


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n images. At 0 and 1 it still has a width; one of half-samples has none."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def frechet_distance(x: NDArray, y: NDArray) -> float:
    """Squared Frechet distance of the Gaussians fitted to x (N, D) and y (M, D).

    |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2)   (Dowson & Landau 1982; Heusel et al., arXiv 1706.08500)

    With A, B the centred features over sqrt(n - 1), the last trace is the nuclear norm of A B^T: real by construction,
    exact for n < D, and without a matrix square root. For n > D, the triangular factors of A and B replace them.
    Raises ConfigError: fewer than two rows, different D, or values that are not finite.
    """
    return frechet(x, y)[0]


def frechet(x: NDArray, y: NDArray | Gaussian, *, resamples: int = 0) -> Measured:
    """`frechet_distance` of x (N, D) to y (M, D), or to a Gaussian of D features, with its interval."""
    if isinstance(y, tuple):
        (x, _), reference = _checked(x, np.stack([y[0]] * 2)), y
    else:
        x, y = _checked(x, y)
        reference = _fit(y)
    value = _between(_fit(x), reference)
    return value, *interval(value, (_between(_fit(x[half]), reference) for half in half_samples(len(x), resamples)))


def _fit(x: Array) -> Gaussian:
    mean = x.mean(0)
    scaled = (x - mean) / np.sqrt(len(x) - 1)
    return mean, np.asarray(np.linalg.qr(scaled, mode="r")) if len(scaled) > scaled.shape[1] else scaled


def _between(x: Gaussian, y: Gaussian) -> float:
    (mean_x, a), (mean_y, b) = x, y
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((mean_x - mean_y) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)


def read_statistics(file: Path) -> tuple[Gaussian, dict[str, Any]]:
    """Mean and covariance of features of real images, and the description of the file for a record.

    Arrays mu (D,) and sigma (D, D), as in ADM's `VIRTUAL_imagenet256_labeled.npz` and in pytorch-fid's files; other
    forms are not read. KID, precision and floor need images, so these files do not give them.
    Raises DataError: another form.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            mean, covariance = (np.asarray_chkfinite(arrays[name], dtype=np.float64) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"mu is {mean.shape} and sigma {covariance.shape}")
        if not np.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-8 * np.abs(covariance).max()):
            raise ValueError("sigma is not symmetric")
        values, vectors = np.linalg.eigh(covariance)
        if values[0] < -1e-3 * values[-1]:  # further below zero than by rounding, even in float32
            raise ValueError(f"sigma has an eigenvalue of {values[0]:.3g}")
    except Exception as error:  # of a damaged archive numpy may raise almost any; the message shows it
        raise DataError(
            f"the reference is test, train or an .npz with mu (D,) and sigma (D, D); {file} is none of them: {error}"
        ) from error
    said = "the sha256 of ADM's files is not known to the kit: compare it with your source's"
    card = {"data": file.stem, "file": file.name, "sha256": file_sha256(file), "verified": said}
    return (mean, np.sqrt(values.clip(0))[:, None] * vectors.T), card


def kid(x: NDArray, y: NDArray, *, resamples: int = 0) -> Measured:
    """Squared maximum mean discrepancy of x (N, D) and y (M, D) under the kernel (<x, y> / D + 1)^3.

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)   (Binkowski et al., 1801.01401)

    All pairs, not a mean over subsets: unbiased, so it may be below zero. One pass over each kernel matrix, in chunks.
    """
    x, y = _checked(x, y)
    weights = np.concatenate([np.ones((1, len(x))), half_samples(len(x), resamples)])  # (1 + R, N)
    n = weights.sum(1)
    within_x = _kernel_sums(x, weights) / (n * (n - 1))
    within_y = _kernel_sums(y, np.ones((1, len(y))))[0] / (len(y) * (len(y) - 1))
    across = weights @ np.concatenate([_kernel(part, y).mean(1) for part in np.array_split(x, -(-len(x) // CHUNK))]) / n
    value, *halves = within_x + within_y - 2 * across
    return float(value), *interval(value, halves)


def _kernel(x: Array, y: Array) -> Array:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_sums(x: Array, weights: Array) -> Array:
    """sum_{i != j} w_i w_j k(x_i, x_j) for each row of weights (R, N)."""
    total = np.zeros(len(weights))
    for start in range(0, len(x), CHUNK):
        part = _kernel(x[start : start + CHUNK], x)  # (c, N)
        np.fill_diagonal(part[:, start:], 0)
        total += ((part @ weights.T) * weights[:, start : start + CHUNK].T).sum(0)
    return total


def prdc(generated: NDArray, real: NDArray, *, k: int = 5) -> dict[str, Measured]:
    """Precision, recall, density and coverage of generated (N, D) against real (M, D).

    A point's ball reaches to its k-th nearest neighbour in its own set, itself not counted. precision: share of
    generated points in a real ball. recall: share of real points in a generated ball. density: mean number of real
    balls a generated point is in, over k. coverage: share of real balls with a generated point in them. "In" is <=
    (Kynkaanniemi et al., arXiv 1904.06991; Naeem et al., arXiv 2002.09797, whose code has <).

    Precision and density are means over generated points, and have the intervals of means. Recall and coverage depend
    on all generated points together. They have no interval, since half of the points would give another spread.
    Raises ConfigError: a set has too few points for k neighbours.
    """
    x, y = map(torch.from_numpy, _checked(generated, real))
    if min(len(x), len(y)) <= k:
        raise ConfigError(f"{len(x)} generated and {len(y)} real images are too few for {k} neighbours")
    radius_x, radius_y = (_nearest(z, z, k + 1)[0][:, -1] for z in (x, y))  # each point is its own nearest
    hits, covered, recalled = torch.zeros(len(x), dtype=torch.double), 0, 0
    for rows, radius in zip(y.split(CHUNK), radius_y.split(CHUNK), strict=True):
        d = _distances(rows, x)  # (c, N)
        inside = d <= radius[:, None]
        hits += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((d <= radius_x).any(1).sum())
    precision, density = float((hits > 0).double().mean()), float(hits.mean()) / k
    half = 1.959964 * float(hits.std()) / k / math.sqrt(len(x))
    return {
        "precision": (precision, *wilson(precision, len(x))),
        "recall": (recalled / len(y), *NO_INTERVAL),
        "density": (density, density - half, density + half),
        "coverage": (covered / len(y), *NO_INTERVAL),
    }


_distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")


def _nearest(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances and indices (N, k) of the rows of y nearest to each row of x, the nearest first."""
    found = [_distances(part, y).topk(k, largest=False) for part in x.split(CHUNK)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def nearest(x: NDArray, y: NDArray) -> tuple[Array, NDArray[np.int64]]:
    """Distance and index (N,) of the row of y (M, D) that is nearest to each row of x (N, D)."""
    x, y = _checked(x, y)
    distance, index = _nearest(torch.from_numpy(x), torch.from_numpy(y), 1)
    return distance[:, 0].numpy(), index[:, 0].numpy()
