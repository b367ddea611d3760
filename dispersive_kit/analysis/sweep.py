"""The block x log-SNR map of a network: every measure at every block and level, in one pass over the images.

Covariances, class means and channel scales are streamed over all images; measures of pairs see the first `KEEP` images,
and those of whole token grids the first `LOCAL_BATCH`: the same images and noise for all arms, blocks and levels. Give
the images in random order (`draw_images`), or the first are of one class.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dispersive_kit.analysis import geometry
from dispersive_kit.analysis.features import LEVELS, POOLS, noisy, tokens
from dispersive_kit.analysis.geometry import Moments
from dispersive_kit.analysis.similarity import cka_matrix, mutual_knn
from dispersive_kit.data import ImageSet
from dispersive_kit.data.files import artefact, versions
from dispersive_kit.diffusion.paths import LINEAR
from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation import weights_sha256
from dispersive_kit.models.dit import DiT
from dispersive_kit.regularizers.losses import LossOptions, measure
from dispersive_kit.training.batches import stream

KEEP = 512  # rows for measures quadratic in their number
LOCAL_BATCH = 64  # images for the saturation gap and the structure of the token grid
UNIFORMITY_T = (0.5, 2.0, 8.0)
TAU = 0.5  # of the loss whose saturation is measured


@dataclass(frozen=True)
class Sweep:
    """Every measure (levels, blocks), the same of a Gaussian with the same covariance, and what was kept.

    values, gaussian: float64 by name. spectra: covariance eigenvalues (levels, blocks, D), falling. cka, neighbours:
    debiased linear CKA and mutual kNN of every two blocks (levels, blocks, blocks). rows: pooled features of the first
    images (levels, blocks, KEEP, D) with their labels. protocol: what makes it comparable.
    """

    levels: tuple[float, ...]
    values: dict[str, Tensor]
    gaussian: dict[str, Tensor]
    spectra: Tensor
    gaussian_spectra: Tensor
    cka: Tensor
    neighbours: Tensor
    rows: Tensor
    labels: Tensor
    protocol: dict[str, Any]


class _Level:
    """What is kept of one level of noise, all blocks stacked: a few matrices, whatever the number of images."""

    def __init__(self, num_classes: int) -> None:
        self.moments, self.tokens = Moments(num_classes), 0
        self.square: Tensor | float = 0.0  # of each channel, summed over images and tokens (blocks, D)
        self.rows: list[Tensor] = []  # pooled, (blocks, B, D) each

    def update(self, taps: list[Tensor], labels: Tensor) -> None:
        """Add what the blocks gave for one batch, each (B, N, D)."""
        pooled = torch.stack([POOLS["mean"](z) for z in taps])  # (blocks, B, D)
        if not self.moments.n:
            local = [z[:LOCAL_BATCH] for z in taps]
            twins = [_gaussian_twin(z.flatten(1)).view_as(z) for z in local]
            self.local, self.local_null = (_grid_measures(grids) for grids in (local, twins))
        self.rows.append(pooled[:, : max(0, KEEP - self.moments.n)])
        self.moments.update(pooled, labels)
        self.square += torch.stack([torch.linalg.vector_norm(z, dim=1).double().square().sum(0) for z in taps])
        self.tokens += len(taps[0]) * taps[0].shape[1]

    def scale(self) -> dict[str, Tensor]:
        """Feature RMS and the largest channel's share, raw: the first confound, every distance grows with it."""
        square = torch.as_tensor(self.square) / self.tokens
        return {"feature_rms": square.mean(-1).sqrt(), "largest_channel": square.amax(-1) / square.sum(-1)}


def sweep(model: DiT, data: ImageSet, levels: Sequence[float] = LEVELS, *, batch_size: int = 250) -> Sweep:
    """Run `model` once over `data` at each level (log-SNR, inf for the clean image), and measure every block.

    Raises:
        ConfigError: fewer images than the local batch, or a smaller batch; classes without a null class.
    """
    if min(batch_size, len(data)) < LOCAL_BATCH:
        raise ConfigError(f"{len(data)} images in batches of {batch_size}: give at least {LOCAL_BATCH} of both")
    kept = [_Level(len(data.classes)) for _ in levels]
    for where, i, x, t in noisy(data.images, levels, batch_size=batch_size):
        kept[i].update(tokens(model, x, t), data.labels[where])
    D = kept[0].moments.mean.shape[-1]
    normal = torch.randn(len(data), D, generator=stream(0, "gaussian"), dtype=torch.double)
    rows = torch.stack([torch.cat(level.rows, 1) for level in kept])
    found = [_measures(level.moments, own) for level, own in zip(kept, rows, strict=True)]
    nulls = [_measures(*_gaussian_moments(level.moments, normal, data.labels)) for level in kept]
    values = [real | level.scale() | level.local for level, (real, _) in zip(kept, found, strict=True)]
    gaussian = [null | level.local_null for level, (null, _) in zip(kept, nulls, strict=True)]
    return Sweep(
        tuple(levels),
        {name: torch.stack([one[name] for one in values]) for name in values[0]},
        {name: torch.stack([one[name] for one in gaussian]) for name in gaussian[0]},
        torch.stack([eigenvalues for _, eigenvalues in found]),
        torch.stack([eigenvalues for _, eigenvalues in nulls]),
        torch.stack([cka_matrix(own) for own in rows]),
        torch.stack([mutual_knn(own) for own in rows]),
        rows,
        data.labels[:KEEP],
        {"data": data.name, "split": data.split, "sha256": data.sha256, "images": len(data),
         "pooling": "residual stream after each block, mean over tokens",
         "log_snr": ["clean" if level == math.inf else level for level in levels], "label": "null class",
         "checkpoint_sha256": weights_sha256(model.state_dict()), "noise_seed": 0, "keep": KEEP,
         "local_batch": LOCAL_BATCH, "tau": TAU, "path": repr(LINEAR), "versions": versions()},
    )  # fmt: skip


def _measures(moments: Moments, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Each measure (blocks,) of pooled features, and the covariance eigenvalues (blocks, D), falling."""
    eigenvalues = torch.linalg.eigvalsh(moments.covariance).flip(-1).clamp(min=0)
    values = {
        "pairwise": moments.mean_pairwise(),
        "cosine_raw": moments.mean_cosine(),
        "cosine": _mean_cosine(rows),
        "rankme": geometry.rankme(eigenvalues),
        "eigenvalue_rank": geometry.entropy_rank(eigenvalues),
        "participation_ratio": moments.participation_ratio(),
        "stable_rank": eigenvalues.sum(-1) / eigenvalues.amax(-1),  # |X|_F^2 / |X|_2^2
        "fisher_ratio": moments.fisher_ratio(),
        "nc1": moments.nc1(),
        "two_nn": torch.stack([geometry.two_nn(x) for x in rows]),  # block by block: the pairs then fit the cache
    }
    uniform = torch.stack([geometry.uniformity(x, UNIFORMITY_T) for x in rows]).unbind(-1)
    return values | {f"uniformity_t{t:g}": one for t, one in zip(UNIFORMITY_T, uniform, strict=True)}, eigenvalues


def _mean_cosine(x: Tensor) -> Tensor:
    """Mean cosine over the pairs i != j of rows (..., N, D) about the mean row; raw ones may be 1 for a large mean."""
    u, N = F.normalize(geometry.centred(x), dim=-1), x.shape[-2]
    return (u.sum(-2).square().sum(-1) - N) / (N * (N - 1))


def _grid_measures(grids: list[Tensor]) -> dict[str, Tensor]:
    """What needs whole token grids z (B, N, D) of a local batch, one a block, as the loss sees them (blocks,)."""
    seen = [measure(z.double(), LossOptions("infonce_l2", TAU)) for z in grids]
    return {
        "saturation_gap": torch.stack([one.loss + math.log(one.rows) for one in seen]),  # above the floor, - log B
        "off_diagonal_mass": torch.stack([one.mass for one in seen]),
        "token_structure": torch.stack([geometry.token_structure(z) for z in grids]),
    }


def _gaussian_twin(x: Tensor) -> Tensor:
    """As many rows (B, D) of the Gaussian with the mean and sample covariance of x, also where D is above B."""
    B = len(x)
    normal = torch.randn(B, B, generator=stream(0, "gaussian twin"), dtype=torch.double)
    return x.double().mean(0) + normal @ geometry.centred(x) / math.sqrt(B - 1)


def _gaussian_moments(moments: Moments, normal: Tensor, labels: Tensor) -> tuple[Moments, Tensor]:
    """The second null: moments and first rows of a Gaussian sample of the same size, mean and covariance."""
    variances, axes = torch.linalg.eigh(moments.covariance)
    root = axes * variances.clamp(min=0).sqrt()[..., None, :]  # (blocks, D, D)
    twin = Moments(moments.num_classes)
    sample = moments.mean[..., None, :] + normal @ root.mT
    twin.update(sample, labels)
    return twin, sample[..., :KEEP, :]


def stored(file: str) -> dict[str, Any]:
    """A shipped file of numbers by name: tensors, fractions in double precision, and what is kept as JSON as it was.

    Raises:
        DataError: the file is missing or damaged.
    """

    def read(value: np.ndarray) -> Any:
        if value.dtype.kind == "U":
            return json.loads(str(value))
        return torch.from_numpy(value.astype(np.float64) if value.dtype.kind == "f" else value)

    with np.load(artefact(file), allow_pickle=False) as arrays:
        return {name: read(arrays[name]) for name in arrays.files}
