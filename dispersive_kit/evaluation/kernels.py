"""Maximum mean discrepancy by kernels: KID, RBF, and the energy distance, each over all pairs."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dispersive_kit.evaluation.distances import Array

Kernel = Callable[[Array, Array], Array]  # (n, D), (m, D) -> (n, m)
CHUNK = 1024  # rows of the kernel matrix held at once
BANDWIDTH_POINTS = 1000


def polynomial(x: Array, y: Array) -> Array:
    """(<x, y> / D + 1)^3, the kernel of KID (Binkowski et al., arXiv 1801.01401)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def rbf(bandwidth: float) -> Kernel:
    """exp(-|x - y|^2 / (2 bandwidth^2))."""
    return lambda x, y: np.exp(-squared_distances(x, y) / (2 * bandwidth**2))


def minus_distance(x: Array, y: Array) -> Array:
    """-|x - y|: its MMD^2 is the energy distance 2 E|x - y| - E|x - x'| - E|y - y'| (Szekely & Rizzo 2013)."""
    return -np.sqrt(squared_distances(x, y))


def squared_distances(x: Array, y: Array) -> Array:
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return squares.clip(min=0)


def median_distance(y: Array) -> float:
    """Median distance among 1,000 rows of the reference, evenly picked: the bandwidth of the RBF kernel."""
    y = y[np.linspace(0, len(y) - 1, min(len(y), BANDWIDTH_POINTS)).astype(int)]
    return float(np.sqrt(np.median(squared_distances(y, y)[np.triu_indices(len(y), 1)])))


def mmd2(x: Array, y: Array, kernel: Kernel, halves: NDArray[np.bool_]) -> tuple[float, Array]:
    """Squared maximum mean discrepancy of x (N, D) and y (M, D) as a U-statistic, and its value on halves of x (R, N).

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)   (Gretton et al. 2012, eq. 3)

    All pairs, not a mean over subsets: unbiased, so it may be below zero. One pass over each kernel matrix, in chunks.
    """
    weights = np.concatenate([np.ones((1, len(x))), halves])  # (1 + R, N)
    n = weights.sum(1)
    within_x = _pairs(x, kernel, weights) / (n * (n - 1))
    within_y = _pairs(y, kernel, np.ones((1, len(y))))[0] / (len(y) * (len(y) - 1))
    across = weights @ np.concatenate([kernel(x[i : i + CHUNK], y).mean(1) for i in range(0, len(x), CHUNK)]) / n
    values = within_x + within_y - 2 * across
    return float(values[0]), values[1:]


def _pairs(x: Array, kernel: Kernel, weights: Array) -> Array:
    """sum_{i != j} w_i w_j k(x_i, x_j) for each row of weights (R, N)."""
    total = np.zeros(len(weights))
    for start in range(0, len(x), CHUNK):
        part = kernel(x[start : start + CHUNK], x)  # (c, N)
        rows = np.arange(len(part))
        part[rows, start + rows] = 0
        total += ((part @ weights.T) * weights[:, start : start + CHUNK].T).sum(0)
    return total
