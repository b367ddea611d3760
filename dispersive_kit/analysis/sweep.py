"""The block x log-SNR map of a network: every measure at every block and level, in one pass over the images.

All blocks are tapped in one forward pass. Covariances, class means and channel scales are streamed over all images;
measures that look at pairs see the first `KEEP` images, and those of whole token grids the first `LOCAL_BATCH`: fixed
sets, so that arms, blocks and levels are compared on the same images and the same noise. Give the images in random
order (`draw_images`), or the first are of one class.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dispersive_kit.analysis import dispersion
from dispersive_kit.analysis.features import LEVELS, POOLING, noisy, tokens
from dispersive_kit.analysis.moments import Moments
from dispersive_kit.analysis.similarity import cka_matrix, shared_neighbours
from dispersive_kit.data import ImageSet
from dispersive_kit.data.files import versions
from dispersive_kit.diffusion.paths import LINEAR, Path
from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation import weights_sha256
from dispersive_kit.models.dit import DiT
from dispersive_kit.training.draws import stream

KEEP = 512  # rows for measures quadratic in their number
LOCAL_BATCH = 64  # images for the saturation gap and the structure of the token grid
UNIFORMITY_T = (0.5, 2.0, 8.0)
UNIFORMITY = tuple(f"uniformity_t{t:g}" for t in UNIFORMITY_T)


@dataclass
class Level:
    """What is kept of one level of noise, all blocks stacked: a few matrices, whatever the number of images."""

    moments: Moments
    square: Tensor | float = 0.0  # of each channel, summed over images and tokens (blocks, D)
    tokens: int = 0
    rows: list[Tensor] = field(default_factory=list)  # pooled, (blocks, B, D) each
    local: list[dict[str, float]] = field(default_factory=list)  # one a block
    local_null: list[dict[str, float]] = field(default_factory=list)

    def update(self, taps: list[Tensor], labels: Tensor, keep: int, tau: float) -> None:
        """Add what the blocks gave for one batch, each (B, N, D)."""
        pooled = torch.stack([z.mean(1) for z in taps])  # (blocks, B, D)
        if not self.moments.n:
            self.local = [grid_measures(z[:LOCAL_BATCH], tau) for z in taps]
            self.local_null = [grid_measures(gaussian_twin(z[:LOCAL_BATCH].flatten(1)).view_as(z[:LOCAL_BATCH]), tau)
                               for z in taps]  # fmt: skip
        if self.moments.n < keep:
            self.rows.append(pooled[:, : keep - self.moments.n])
        self.moments.update(pooled, labels)
        self.square += torch.stack([torch.linalg.vector_norm(z, dim=1).double().square().sum(0) for z in taps])
        self.tokens += len(taps[0]) * taps[0].shape[1]


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


def sweep(
    model: DiT,
    data: ImageSet,
    levels: Sequence[float] = LEVELS,
    *,
    seed: int = 0,
    tau: float = 0.5,
    batch_size: int = 250,
    keep: int = KEEP,
    path: Path = LINEAR,
) -> Sweep:
    """Run `model` once over `data` at each level (log-SNR, inf for the clean image), and measure every block.

    seed: of the noise. tau: of the loss whose saturation is measured. keep: rows for measures of pairs. path: that the
    network was trained on, which says at which time it meets a log-SNR.

    Raises:
        ConfigError: fewer images than the local batch, or a smaller batch; classes without a null class.
    """
    if min(batch_size, len(data)) < LOCAL_BATCH:
        raise ConfigError(f"{len(data)} images in batches of {batch_size}: give at least {LOCAL_BATCH} of both")
    kept = [Level(Moments(len(data.classes))) for _ in levels]
    for where, i, x, t in noisy(data.images, levels, seed=seed, path=path, batch_size=batch_size):
        kept[i].update(tokens(model, x, t), data.labels[where], keep, tau)
    D = kept[0].moments.mean.shape[-1]
    normal = torch.randn(len(data), D, generator=stream(seed, "gaussian"), dtype=torch.double)
    rows = torch.stack([torch.cat(level.rows, 1) for level in kept])
    found = [measures(level.moments, own) for level, own in zip(kept, rows, strict=True)]
    nulls = [measures(*gaussian_moments(level.moments, normal, data.labels, keep)) for level in kept]
    values = [real | scale(level) | by_block(level.local) for level, (real, _) in zip(kept, found, strict=True)]
    gaussian = [real | by_block(level.local_null) for level, (real, _) in zip(kept, nulls, strict=True)]
    return Sweep(
        tuple(levels),
        {name: torch.stack([one[name] for one in values]) for name in values[0]},
        {name: torch.stack([one[name] for one in gaussian]) for name in gaussian[0]},
        torch.stack([eigenvalues for _, eigenvalues in found]),
        torch.stack([eigenvalues for _, eigenvalues in nulls]),
        torch.stack([cka_matrix(own) for own in rows]),
        torch.stack([shared_neighbours(own) for own in rows]),
        rows,
        data.labels[:keep],
        {"data": data.name, "split": data.split, "sha256": data.sha256, "images": len(data), "pooling": POOLING,
         "log_snr": ["clean" if level == math.inf else level for level in levels], "label": "null class",
         "checkpoint_sha256": weights_sha256(model.state_dict()), "noise_seed": seed, "keep": keep,
         "local_batch": LOCAL_BATCH, "tau": tau, "path": repr(path), "versions": versions()},
    )  # fmt: skip


def measures(moments: Moments, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Each measure (blocks,) of pooled features, and the covariance eigenvalues (blocks, D), falling."""
    eigenvalues = torch.linalg.eigvalsh(moments.covariance).flip(-1).clamp(min=0)
    values = {
        "pairwise": moments.mean_pairwise(),
        "cosine_raw": moments.mean_cosine(),
        "cosine": dispersion.mean_cosine(rows),
        "rankme": dispersion.rankme(eigenvalues),
        "eigenvalue_rank": dispersion.eigenvalue_rank(eigenvalues),
        "participation_ratio": moments.participation_ratio(),
        "stable_rank": dispersion.stable_rank(eigenvalues),
        "fisher_ratio": moments.fisher_ratio(),
        "nc1": moments.nc1(),
        "two_nn": torch.stack([dispersion.two_nn(x) for x in rows]),  # block by block: the pairs then fit the cache
    }
    uniform = torch.stack([dispersion.uniformity(x, UNIFORMITY_T) for x in rows])
    return values | dict(zip(UNIFORMITY, uniform.unbind(-1), strict=True)), eigenvalues


def scale(level: Level) -> dict[str, Tensor]:
    rms, share = dispersion.channel_scale(torch.as_tensor(level.square) / level.tokens)
    return {"feature_rms": rms, "largest_channel": share}


def grid_measures(z: Tensor, tau: float) -> dict[str, float]:
    """What needs whole token grids z (B, N, D) of a local batch, as the loss sees them."""
    gap, mass = dispersion.saturation(z, tau)
    return {
        "saturation_gap": float(gap),
        "off_diagonal_mass": float(mass),
        "token_structure": float(dispersion.token_structure(z)),
    }


def by_block(local: list[dict[str, float]]) -> dict[str, Tensor]:
    return {name: torch.tensor([one[name] for one in local], dtype=torch.double) for name in local[0]}


def gaussian_twin(x: Tensor) -> Tensor:
    """As many rows (B, D) of the Gaussian with the mean and sample covariance of x, also where D is above B."""
    B = len(x)
    normal = torch.randn(B, B, generator=stream(0, "gaussian twin"), dtype=torch.double)
    return x.double().mean(0) + normal @ dispersion.centred(x) / math.sqrt(B - 1)


def gaussian_moments(moments: Moments, normal: Tensor, labels: Tensor, keep: int) -> tuple[Moments, Tensor]:
    """The second null: moments and first rows of a Gaussian sample of the same size, mean and covariance."""
    variances, axes = torch.linalg.eigh(moments.covariance)
    root = axes * variances.clamp(min=0).sqrt()[..., None, :]  # (blocks, D, D)
    twin = Moments(moments.num_classes)
    sample = moments.mean[..., None, :] + normal @ root.mT
    twin.update(sample, labels)
    return twin, sample[..., :keep, :]
