"""Measures of one set of features: how far apart rows lie, in which directions, and what of it is signal.

Rows (..., N, D) are images after pooling, in any float type; everything is worked out in float64 and, but where it
says "raw", about the mean row. Leading axes (blocks) are kept. What needs only a covariance or class means is in
`moments.py`, where it is streamed; what looks at all pairs is here, and wants a fixed, moderate number of rows.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dispersive_kit.errors import DataError
from dispersive_kit.regularizers.losses import LossOptions, measure

TWONN_DISCARD = 0.1  # the share of largest ratios that Facco et al. leave out: outliers bend the line


def centred(x: Tensor) -> Tensor:
    """Rows (..., N, D) less their mean, in float64; twice, since the first mean is rounded where it is large."""
    x = x.double()
    x = x - x.mean(-2, keepdim=True)
    return x - x.mean(-2, keepdim=True)


def mean_cosine(x: Tensor) -> Tensor:
    """Mean cosine over the pairs i != j about the mean row; orthonormal rows give 0 raw, -1 / (N - 1) here.

    Raw cosines, `Moments.mean_cosine`, may be .99999 for one large mean channel and nothing else.
    """
    N = x.shape[-2]
    if N < 2:
        raise DataError("one row has no pairs: give at least 2")
    u = F.normalize(centred(x), dim=-1)
    return (u.sum(-2).square().sum(-1) - N) / (N * (N - 1))


def uniformity(x: Tensor, t: Sequence[float] = (2.0,), *, raw: bool = False) -> Tensor:
    """log E exp(-t |u_i - u_j|^2) over i != j, u = x / |x|, for each t (..., len(t)); see `uniformity_floor`.

    Wang & Isola, arXiv 2005.10242; theirs is raw.
    """
    u = F.normalize(x.double() if raw else centred(x), dim=-1)
    cosine = u @ u.mT
    cosine.diagonal(dim1=-2, dim2=-1).fill_(-math.inf)
    total = [torch.exp(2 * one * (cosine - 1)).sum((-2, -1)) for one in t]
    return torch.stack(total, -1).log() - math.log(cosine.shape[-1] * (cosine.shape[-1] - 1))


def uniformity_floor(dim: int, t: float = 2.0) -> float:
    """Its value for the uniform law on the sphere of R^dim, -2 t + log 0F1(; dim / 2; t^2): any isotropic cloud of high
    dimension is there, so being there says little.
    """
    from scipy.special import hyp0f1

    return -2 * t + math.log(hyp0f1(dim / 2, t * t))


def alignment(x: Tensor) -> Tensor:
    """E |u(x, e1) - u(x, e2)|^2 of rows (draws, N, D), u about the mean: 0 if noise changes nothing, 2 if all.

    To be read with uniformity: a constant has perfect alignment.
    """
    u = F.normalize(centred(x.flatten(0, 1)), dim=-1).unflatten(0, x.shape[:2])
    R = len(u)
    agreement = (u.sum(0).square().sum(-1) - R) / (R * (R - 1))  # mean cosine over pairs of draws, (N,)
    return 2 - 2 * agreement.mean()


def signal_to_noise(x: Tensor) -> Tensor:
    """Between-image over within-noise variance of rows (draws, N, D): the spread that tells images apart.

    One-way analysis of variance with random effects, traces over channels: (MS_between / MS_within - 1) / draws. It
    may come out slightly negative where there is no signal.
    """
    x = x.double()
    R, N, _ = x.shape
    image = x.mean(0)  # (N, D)
    between = R * centred(image).square().sum() / (N - 1)
    within = (x - image).square().sum() / (N * (R - 1))
    return (between / within - 1) / R


def saturation(z: Tensor, tau: float = 0.5) -> tuple[Tensor, Tensor]:
    """Gap L + log B of the l2 loss above its floor, and the off-diagonal mass, for a local batch z (B, ...).

    Both depend on B and tau, so they say something only of the batch that training sees.
    """
    measured = measure(z.double(), LossOptions("infonce_l2", tau))
    return measured.loss + math.log(measured.rows), measured.mass


def spectrum(x: Tensor) -> Tensor:
    """Eigenvalues (..., min(N, D)) of the covariance of rows, falling, through the smaller of the two products."""
    x = centred(x)
    N, D = x.shape[-2:]
    product = x @ x.mT if N < D else x.mT @ x
    return torch.linalg.eigvalsh(product / (N - 1)).flip(-1).clamp(min=0)


def entropy_rank(weights: Tensor) -> Tensor:
    """exp of the entropy of weights (..., k) scaled to sum 1: r for r equal ones."""
    p = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.special.xlogy(p, p).sum(-1).neg().exp()


def rankme(eigenvalues: Tensor) -> Tensor:
    """exp of the entropy of the singular values (RankMe, arXiv 2210.02885; effective rank of Roy & Vetterli, 2007; the
    `effective_rank` of the training log), here of centred rows. At most N - 1: 31 at N = 32 for a true 256.
    """
    return entropy_rank(eigenvalues.clamp(min=0).sqrt())


def eigenvalue_rank(eigenvalues: Tensor) -> Tensor:
    """exp of the entropy of the variances: also called effective rank, and smaller, since it weighs the tail less."""
    return entropy_rank(eigenvalues.clamp(min=0))


def stable_rank(eigenvalues: Tensor) -> Tensor:
    """|X|_F^2 / |X|_2^2 = tr S / largest eigenvalue, of centred rows."""
    return eigenvalues.sum(-1) / eigenvalues.amax(-1)


def channel_scale(mean_square: Tensor) -> tuple[Tensor, Tensor]:
    """Feature RMS, and the largest channel's share, from each channel's mean square (..., D), raw.

    The first confound: every squared distance grows with it, whatever the features mean.
    """
    return mean_square.mean(-1).sqrt(), mean_square.amax(-1) / mean_square.sum(-1)


def two_nn(x: Tensor) -> Tensor:
    """Intrinsic dimension from the ratio of the second to the first neighbour's distance (Facco et al., 2017).

    The slope through the origin of -log(1 - F(mu)) against log mu, without the largest tenth of the ratios.
    """
    x = centred(x)  # or the Gram matrix inside would cancel: float32 and a large mean lose two digits
    near = torch.cdist(x, x).topk(3, largest=False).values.clamp(min=1e-300)  # (..., N, 3), itself first
    ratio = (near[..., 2] / near[..., 1]).log().sort(-1).values  # log mu, rising
    kept = ratio[..., : int(ratio.shape[-1] * (1 - TWONN_DISCARD))]
    share = torch.arange(1, kept.shape[-1] + 1, dtype=kept.dtype, device=kept.device) / ratio.shape[-1]
    return (kept * -torch.log1p(-share)).sum(-1) / kept.square().sum(-1)


def token_structure(z: Tensor) -> Tensor:
    """Cosine of neighbouring tokens less that of tokens at least half the grid apart, z (B, N, D) on a square grid.

    Each position's mean over the images is subtracted first, so that the fixed position code does not count. 0 where
    tokens know nothing of where they are; after the local-against-distant index of iREPA.
    """
    u = F.normalize(centred(z.transpose(0, 1)).transpose(0, 1), dim=-1)
    grid = math.isqrt(z.shape[1])
    place = torch.cartesian_prod(*[torch.arange(grid, device=z.device)] * 2)
    steps = (place[:, None] - place).abs().sum(-1)  # (N, N), Manhattan
    cosine = (u @ u.mT).mean(0)
    return cosine[steps == 1].mean() - cosine[steps >= max(2, grid // 2)].mean()
