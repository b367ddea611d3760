"""The block x log-SNR map of a network: every measure at every block and level, in one pass over the images.

Measures of pairs use the first `KEEP` images, and those of whole token grids the first `LOCAL_BATCH`: the same images
and noise for all arms, blocks and levels. Give images in random order (`draw_images`): a set may be sorted by class.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dispersive_kit.analysis import geometry
from dispersive_kit.analysis.features import LEVELS, POOLS, encoder, noisy, pooling
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
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Sweep:
    """Every measure (levels, blocks), the same of a Gaussian with the same covariance, and what was kept.

    values, gaussian: float64 by name. spectra: covariance eigenvalues (levels, blocks, E), falling. cka: debiased
    linear CKA of every two blocks (levels, blocks, blocks). rows: pooled features of the first images (levels, blocks,
    KEEP, E). protocol: how it was measured, with the pooling.
    """

    values: Values
    gaussian: Values
    spectra: Tensor
    gaussian_spectra: Tensor
    cka: Tensor
    rows: Tensor
    protocol: dict[str, Any]


def sweep(model: DiT, data: ImageSet, levels: Sequence[float] = LEVELS, *, pool: str = "tokens") -> Sweep:
    """Run `model` over `data` at each level (log-SNR, inf for the clean image), and measure every block.

    pool: how tokens become rows, a name in `POOLS`. The rows (levels, blocks, N, E) of all images are held in memory.
    Raises ConfigError: fewer images than the local batch; classes without a null class.
    """
    if len(data) < LOCAL_BATCH:
        raise ConfigError(f"{len(data)} images: give at least {LOCAL_BATCH}")
    encode = encoder(model)
    pooled = pooling(pool, encode, data.images, levels)
    rows: list[list[Tensor]] = [[] for _ in levels]
    squares: list[list[Tensor]] = [[] for _ in levels]  # of each channel, summed over images and tokens (blocks, D)
    local: list[tuple[Values, Values]] = []
    for where, i, x, t in noisy(data.images, levels):
        z = encode(x, t, where)  # (blocks, B, N, D)
        if not rows[i]:
            grids = z[:, :LOCAL_BATCH]
            twins = [_gaussian_twin(grid.flatten(1)).view_as(grid) for grid in grids]
            local.append((_grid_measures(list(grids)), _grid_measures(twins)))
        rows[i].append(pooled(z, i))
        squares[i].append(torch.linalg.vector_norm(z, dim=2).double().square().sum(1))
    normal = torch.randn(len(data), rows[0][0].shape[-1], generator=stream(0, "gaussian"), dtype=torch.double)
    whole = [torch.cat(level, 1) for level in rows]  # (blocks, N, E)
    found = [_measures(x, data.labels) for x in whole]
    nulls = [_measures(_gaussian(x, normal), data.labels) for x in whole]
    # Raw rows: every distance grows with the size of the features, which is the first confounder.
    means: list[Tensor] = [torch.stack(square).sum(0) / (len(data) * z.shape[2]) for square in squares]
    scales = [{"feature_rms": x.mean(-1).sqrt(), "largest_channel": x.amax(-1) / x.sum(-1)} for x in means]
    values = [real | scale | own for (real, _), scale, (own, _) in zip(found, scales, local, strict=True)]
    gaussian = [null | own for (null, _), (_, own) in zip(nulls, local, strict=True)]
    kept = torch.stack([x[:, :KEEP] for x in whole])
    return Sweep(
        {name: torch.stack([one[name] for one in values]) for name in values[0]},
        {name: torch.stack([one[name] for one in gaussian]) for name in gaussian[0]},
        torch.stack([eigenvalues for _, eigenvalues in found]),
        torch.stack([eigenvalues for _, eigenvalues in nulls]),
        torch.stack([geometry.cka_matrix(own) for own in kept]),
        kept,
        {"data": data.name, "split": data.split, "sha256": data.sha256, "images": len(data), "pool": pool,
         "pooling": f"residual stream after each block, {POOLS[pool]}",
         "log_snr": ["clean" if level == math.inf else level for level in levels], "label": "null class",
         "checkpoint_sha256": weights_sha256(model.state_dict()), "noise_seed": 0, "keep": KEEP,
         "local_batch": LOCAL_BATCH, "tau": geometry.TAU, "path": repr(LINEAR), "versions": versions()},
    )  # fmt: skip


def _measures(x: Tensor, labels: Tensor) -> tuple[Values, Tensor]:
    """Each measure (blocks,) of rows (blocks, N, E), and the covariance eigenvalues (blocks, E), falling."""
    eigenvalues, first = geometry.spectrum(x), x[:, :KEEP]
    scatter = geometry.class_scatter(x, labels)
    values = {
        "pairwise": geometry.mean_pairwise(x),
        "cosine": geometry.mean_cosine(first),
        "rankme": geometry.rankme(eigenvalues),
        "eigenvalue_rank": geometry.entropy_rank(eigenvalues),
        "participation_ratio": geometry.participation_ratio(x),
        "stable_rank": eigenvalues.sum(-1) / eigenvalues.amax(-1),  # |X|_F^2 / |X|_2^2
        "fisher_ratio": geometry.fisher_ratio(*scatter),
        "nc1": geometry.nc1(*scatter, len(labels.unique())),
        "two_nn": torch.stack([geometry.two_nn(block) for block in first]),  # block by block: they then fit the cache
    }
    uniform = torch.stack([geometry.uniformity(block, UNIFORMITY_T) for block in first]).unbind(-1)
    return values | {f"uniformity_t{t:g}": one for t, one in zip(UNIFORMITY_T, uniform, strict=True)}, eigenvalues


def _grid_measures(grids: list[Tensor]) -> Values:
    """Measures (blocks,) of whole token grids z (B, N, D) of a local batch, one a block, as the loss gets them."""
    seen = [measure(z.double(), LossOptions("infonce_l2", geometry.TAU)) for z in grids]
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


def _gaussian(x: Tensor, normal: Tensor) -> Tensor:
    """The second null: rows (blocks, N, E) of a Gaussian sample of the size, mean and covariance of x."""
    rows = geometry.centred(x)
    variances, axes = torch.linalg.eigh(rows.mT @ rows / (len(normal) - 1))
    root = axes * variances.clamp(min=0).sqrt()[..., None, :]  # (blocks, E, E)
    return x.double().mean(-2, keepdim=True) + normal @ root.mT


def stored(file: str) -> dict[str, Tensor]:
    """The arrays of a shipped file by name, as tensors; floating point numbers in double precision.

    Raises DataError: the file is missing or damaged.
    """
    with np.load(artefact(file), allow_pickle=False) as arrays:
        return {name: torch.from_numpy(x.astype(float) if x.dtype.kind == "f" else x) for name, x in arrays.items()}
