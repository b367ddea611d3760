"""Wasserstein-2 distance: exact for a few points, sliced for features."""

import numpy as np
from numpy.typing import NDArray

from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation.distances import Array, checked_pair

PROJECTIONS = 256


def sliced_w2(
    x: NDArray, y: NDArray, halves: NDArray[np.bool_], *, projections: int = PROJECTIONS, seed: int = 0
) -> tuple[float, Array]:
    """Root of the mean squared W2 of x (N, D) and y (M, D) over random directions, and its value on halves of x.

    Bonneel et al. 2015. N and M may differ: the quantile functions are compared exactly.
    """
    x, y = checked_pair(x, y)
    directions = np.random.default_rng(seed).normal(size=(x.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    along_x, along_y = x @ directions, np.sort(y @ directions, axis=0)  # (N, L), (M, L)
    values = [_w2_of_columns(np.sort(part, axis=0), along_y) for part in (along_x, *(along_x[h] for h in halves))]
    return values[0], np.array(values[1:])


def _w2_of_columns(x: Array, y: Array) -> float:
    """Root mean over columns of the squared W2 of sorted columns (N, L) and (M, L)."""
    n, m = len(x), len(y)
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # in units of 1 / (n m), exact
    lengths = np.diff(ends, prepend=0)
    last = ends - 1  # a level inside each piece
    gaps = x[last // m] - y[last // n]  # (pieces, L)
    return float(np.sqrt((lengths @ gaps**2).mean() / (n * m)))


def exact_w2(x: NDArray, y: NDArray) -> float:
    """W2 of two equally large sets of points (N, D) by the best pairing; N^3, for 2-D sets of some thousand points.

    Raises:
        ConfigError: the sets are not equally large.
    """
    from scipy.optimize import linear_sum_assignment

    x, y = checked_pair(x, y)
    if len(x) != len(y):
        raise ConfigError(f"exact W2 pairs points, and was given {len(x)} and {len(y)}: give as many of each")
    cost = ((x[:, None] - y[None]) ** 2).sum(-1)  # (N, N)
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))
