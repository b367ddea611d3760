"""Nearest neighbours: precision, recall, density, coverage, and whether samples are copies of training images.

Distances are differences squared and summed, not a Gram matrix: equal points are at distance exactly 0, and a
distance has the same bits in every chunk, which `<=` at a radius depends on.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation.distances import Array, Interval, checked_pair, half_samples

CHUNK = 512  # rows of the distance matrix held at once
KEPT = 32  # nearest neighbours kept, among which those within a half-sample are looked for


def distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def nearest_others(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances and indices (N, k) of the k nearest other rows, ascending; a copy of a row counts as another."""
    near, index = [], []
    for start in range(0, len(x), CHUNK):
        part = distances(x[start : start + CHUNK], x)  # (c, N)
        rows = torch.arange(len(part))
        part[rows, start + rows] = torch.inf
        found = part.topk(k, largest=False)
        near.append(found.values)
        index.append(found.indices)
    return torch.cat(near), torch.cat(index)


def prdc(
    generated: NDArray, real: NDArray, halves: NDArray[np.bool_], *, k: int = 5
) -> dict[str, tuple[float, NDArray[np.float64]]]:
    """Precision, recall, density and coverage of generated (N, D) against real (M, D), each with its halves (R,).

    A point's ball reaches to its k-th nearest neighbour in its own set, itself not counted. precision: share of
    generated points in a real ball. recall: share of real points in a generated ball. density: mean number of real
    balls a generated point is in, over k. coverage: share of real balls with a generated point in them. "In" is <=
    (Kynkaanniemi et al., arXiv 1904.06991; Naeem et al., arXiv 2002.09797, whose code has <).

    Raises:
        ConfigError: a half-sample has no k neighbours.
    """
    x, y = (torch.from_numpy(features) for features in checked_pair(generated, real))
    if len(x) // (2 if len(halves) else 1) <= k or len(y) <= k:
        raise ConfigError(f"{len(x)} generated and {len(y)} real images are too few for {k} neighbours")
    members = torch.from_numpy(np.concatenate([np.ones((1, len(x)), dtype=bool), halves]))  # (1 + R, N)
    radius_y = nearest_others(y, k)[0][:, -1]
    radius_x = _radii_within(x, members, k)  # (1 + R, N)
    weights = members.double()
    hits, covered, recalled = torch.zeros(len(x)), torch.zeros(len(members)), torch.zeros(len(members))
    for start in range(0, len(y), CHUNK):
        d = distances(y[start : start + CHUNK], x)  # (c, N)
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


def _radii_within(x: Tensor, members: Tensor, k: int) -> Tensor:
    """Distance to the k-th nearest neighbour among the members (R, N) only; -1 for a point that is not one itself.

    Looked for among the nearest 32 (fewer than k of these in a random half: once in 10^5 points at k = 5).
    """
    near, index = nearest_others(x, min(KEPT, len(x) - 1))  # (N, K)
    radii = []
    for member in members:
        rank = member[index].cumsum(1)
        position = (rank < k).sum(1).clamp(max=near.shape[1] - 1)  # of the k-th member
        radii.append(torch.where(member, near.gather(1, position[:, None])[:, 0], -1.0))
    return torch.stack(radii)


def nearest_rows(x: NDArray, y: NDArray) -> tuple[Array, NDArray[np.int64]]:
    """Distance (N,) and index (N,) of the row of y nearest to each row of x."""
    x, y = checked_pair(x, y)
    b = torch.from_numpy(y)
    found = [distances(part, b).min(1) for part in torch.from_numpy(x).split(CHUNK)]
    return torch.cat([f.values for f in found]).numpy(), torch.cat([f.indices for f in found]).numpy()


@dataclass(frozen=True)
class Memorisation:
    """How near samples are to training images, compared with real images that nobody trained on.

    Attributes:
        ratio: median nearest-train distance of the generated over that of the held-out; about 1 if nothing was
            copied, towards 0 if all was. floor: the same ratio of one half of the held-out over the other.
        distance, index: of the nearest training image of each generated one (N,).
        copies: share of generated images as near as the nearest 1 % of the held-out; 0.01 is expected.
    """

    ratio: Interval
    floor: float
    copies: float
    distance: Array
    index: NDArray[np.int64]


def memorisation(generated: NDArray, held_out: NDArray, train: NDArray, *, resamples: int = 100) -> Memorisation:
    """The check on features (N, D), (M, D) and (T, D). Raises ConfigError: as `checked_pair`."""
    distance, index = nearest_rows(generated, train)
    real, _ = nearest_rows(held_out, train)
    usual = float(np.median(real))
    if usual == 0:
        raise ConfigError("half of the held-out images are in the training set: the splits are not apart")
    halves = [np.median(distance[half]) / usual for half in half_samples(len(distance), resamples)]
    return Memorisation(
        ratio=Interval.around(float(np.median(distance)) / usual, np.array(halves)),
        floor=float(np.median(real[::2]) / np.median(real[1::2])),
        copies=float((distance <= np.quantile(real, 0.01)).mean()),
        distance=distance,
        index=index,
    )
