"""What is measured between two sets of features (N, D), in float64, each with its value on random halves of the first.

Where distances between rows count they are differences squared and summed, not a Gram matrix: equal points are at
distance exactly 0, and a distance has the same bits in every chunk, which `<=` at a radius depends on.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dispersive_kit.errors import ConfigError

Array = NDArray[np.float64]
Halves = NDArray[np.bool_]  # (R, N): which of N samples are in each random half
Valued = tuple[float, Array]  # the value of all samples, and those of the halves (R,)

CHUNK = 512  # rows of a matrix of pairs held at once
KEPT = 32  # nearest neighbours kept, among which those within a half-sample are looked for


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


def half_samples(n: int, resamples: int = 100) -> Halves:
    """Which of n samples are in each random half, without replacement (R, n): a bootstrap's ties would add a bias."""
    rng = np.random.default_rng(0)
    return np.array([rng.permutation(n).argsort() < n // 2 for _ in range(resamples)], dtype=bool).reshape(-1, n)


def interval(value: float, halves: Array) -> tuple[float, float]:
    """Ends of the central 95 % from the value of all samples and those of its half-samples (R,); NaN without any.

    The deviations of the halves from their mean are set around the value as they are: for N / 2 of N without
    replacement the two spreads are of one size. Where x and y are of one law, a distance is quadratic in the sampling
    error, and the interval is up to 3^(1/2) times too wide.
    """
    if not len(halves):
        return math.nan, math.nan
    low, high = np.percentile(halves - halves.mean(), [2.5, 97.5])
    return float(value + low), float(value + high)


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share among n images: not empty at 0 or 1, as that of half-samples is."""
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def frechet_distance(x: NDArray, y: NDArray) -> float:
    """Squared Frechet distance of the Gaussians fitted to x (N, D) and y (M, D).

    |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2)   (Dowson & Landau 1982; Heusel et al., arXiv 1706.08500)

    With A, B the centred features over sqrt(n - 1), the last trace is the nuclear norm of A B^T: real by construction,
    exact for n < D, and no matrix square root. For n > D the triangular factors of A and B stand in for them.

    Raises:
        ConfigError: fewer than two rows, different D, or values that are not finite.
    """
    return frechet_on_halves(x, y, half_samples(len(x), 0))[0]


def frechet_on_halves(x: NDArray, y: NDArray, halves: Halves) -> Valued:
    """`frechet_distance` of x (N, D) to y (M, D), and of each half of x."""
    x, y = _checked(x, y)
    reference = _fit(y)
    return _between(_fit(x), reference), np.array([_between(_fit(x[half]), reference) for half in halves])


def _fit(x: Array) -> tuple[Array, Array]:
    """Mean (D,) and a factor A (at most D rows) with A^T A = covariance."""
    mean = x.mean(0)
    scaled = (x - mean) / np.sqrt(len(x) - 1)
    return mean, np.asarray(np.linalg.qr(scaled, mode="r")) if len(scaled) > scaled.shape[1] else scaled


def _between(x: tuple[Array, Array], y: tuple[Array, Array]) -> float:
    (mean_x, a), (mean_y, b) = x, y
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((mean_x - mean_y) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)


def kid(x: NDArray, y: NDArray, halves: Halves) -> Valued:
    """Squared maximum mean discrepancy of x (N, D) and y (M, D) under the kernel (<x, y> / D + 1)^3.

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)   (Binkowski et al., 1801.01401)

    All pairs, not a mean over subsets: unbiased, so it may be below zero. One pass over each kernel matrix, in chunks.
    """
    x, y = _checked(x, y)
    weights = np.concatenate([np.ones((1, len(x))), halves])  # (1 + R, N)
    n = weights.sum(1)
    within_x = _kernel_sums(x, weights) / (n * (n - 1))
    within_y = _kernel_sums(y, np.ones((1, len(y))))[0] / (len(y) * (len(y) - 1))
    across = weights @ np.concatenate([_kernel(x[i : i + CHUNK], y).mean(1) for i in range(0, len(x), CHUNK)]) / n
    values = within_x + within_y - 2 * across
    return float(values[0]), values[1:]


def _kernel(x: Array, y: Array) -> Array:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_sums(x: Array, weights: Array) -> Array:
    """sum_{i != j} w_i w_j k(x_i, x_j) for each row of weights (R, N)."""
    total = np.zeros(len(weights))
    for start in range(0, len(x), CHUNK):
        part = _kernel(x[start : start + CHUNK], x)  # (c, N)
        rows = np.arange(len(part))
        part[rows, start + rows] = 0
        total += ((part @ weights.T) * weights[:, start : start + CHUNK].T).sum(0)
    return total


def prdc(generated: NDArray, real: NDArray, halves: Halves, *, k: int = 5) -> dict[str, Valued]:
    """Precision, recall, density and coverage of generated (N, D) against real (M, D).

    A point's ball reaches to its k-th nearest neighbour in its own set, itself not counted. precision: share of
    generated points in a real ball. recall: share of real points in a generated ball. density: mean number of real
    balls a generated point is in, over k. coverage: share of real balls with a generated point in them. "In" is <=
    (Kynkaanniemi et al., arXiv 1904.06991; Naeem et al., arXiv 2002.09797, whose code has <).

    Raises:
        ConfigError: a half-sample has no k neighbours.
    """
    x, y = map(torch.from_numpy, _checked(generated, real))
    if len(x) // (2 if len(halves) else 1) <= k or len(y) <= k:
        raise ConfigError(f"{len(x)} generated and {len(y)} real images are too few for {k} neighbours")
    members = torch.from_numpy(np.concatenate([np.ones((1, len(x)), dtype=bool), halves]))  # (1 + R, N)
    radius_y = _nearest(y, None, k)[0][:, -1]
    radius_x = _radii_within(x, members, k)  # (1 + R, N)
    weights = members.double()
    hits, covered, recalled = torch.zeros(len(x)), torch.zeros(len(members)), torch.zeros(len(members))
    for start in range(0, len(y), CHUNK):
        d = _distances(y[start : start + CHUNK], x)  # (c, N)
        inside = d <= radius_y[start : start + CHUNK, None]
        hits += inside.sum(0)
        covered += (inside.double() @ weights.T > 0).sum(0)
        recalled += torch.stack([(d <= radius).any(1).sum() for radius in radius_x])
    n = weights.sum(1)
    found = {
        "precision": weights @ (hits > 0).double() / n,
        "recall": recalled.double() / len(y),
        "density": weights @ hits.double() / (k * n),
        "coverage": covered.double() / len(y),
    }
    return {name: (float(values[0]), values[1:].numpy()) for name, values in found.items()}


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _nearest(x: Tensor, y: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Distances and indices (N, k) of the rows of y nearest to each row of x; None: other rows of x, copies too."""
    found = []
    for start in range(0, len(x), CHUNK):
        part = _distances(x[start : start + CHUNK], x if y is None else y)
        if y is None:
            rows = torch.arange(len(part))
            part[rows, start + rows] = torch.inf
        found.append(part.topk(k, largest=False))
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def _radii_within(x: Tensor, members: Tensor, k: int) -> Tensor:
    """Distance to the k-th nearest neighbour among the members (R, N) only; -1 for a point that is not one itself.

    Looked for among the nearest 32 (fewer than k of these in a random half: once in 10^5 points at k = 5).
    """
    near, index = _nearest(x, None, min(KEPT, len(x) - 1))  # (N, K)
    ranks = (member[index].cumsum(1) for member in members)
    positions = [(rank < k).sum(1, keepdim=True).clamp(max=near.shape[1] - 1) for rank in ranks]  # of the k-th member
    return torch.where(members, torch.stack([near.gather(1, one)[:, 0] for one in positions]), -1.0)


@dataclass(frozen=True)
class Memorisation:
    """How near samples are to training images, compared with real images that nobody trained on.

    Attributes:
        ratio: median nearest-train distance of the generated over that of the held-out; about 1 if nothing was
            copied, towards 0 if all was; low, high: its interval. floor: the same ratio of one half of the held-out
            over the other.
        distance, index: of the nearest training image of each generated one (N,).
        copies: share of generated images as near as the nearest 1 % of the held-out; 0.01 is expected.
    """

    ratio: float
    low: float
    high: float
    floor: float
    copies: float
    distance: Array
    index: NDArray[np.int64]


def memorisation(generated: NDArray, held_out: NDArray, train: NDArray, *, resamples: int = 100) -> Memorisation:
    """The check on features (N, D), (M, D) and (T, D).

    Raises:
        ConfigError: features that do not belong together; half of the held-out rows are training rows.
    """
    generated, held_out, train = _checked(generated, held_out, train)
    (distance, index), (real, _) = (
        [found[:, 0].numpy() for found in _nearest(torch.from_numpy(x), torch.from_numpy(train), 1)]
        for x in (generated, held_out)
    )
    usual = float(np.median(real))
    if usual == 0:
        raise ConfigError("half of the held-out images are in the training set: the splits are not apart")
    ratio = float(np.median(distance)) / usual
    halves = np.array([np.median(distance[half]) / usual for half in half_samples(len(distance), resamples)])
    floor, copies = np.median(real[::2]) / np.median(real[1::2]), (distance <= np.quantile(real, 0.01)).mean()
    return Memorisation(ratio, *interval(ratio, halves), float(floor), float(copies), distance, index)
