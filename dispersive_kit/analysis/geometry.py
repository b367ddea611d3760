"""The geometry of features: distances, directions, signal and noise, gradients, and comparisons of two sets.

Rows (..., N, D) are images after pooling. Everything is computed in float64 and, unless it says "raw", on rows minus
their mean. Leading axes (blocks) are kept.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispersive_kit.data import ImageSet
from dispersive_kit.diffusion.objectives import FlowMatching
from dispersive_kit.errors import DataError
from dispersive_kit.regularizers.losses import LossOptions, measure
from dispersive_kit.training.batches import DeviceSet

WEIGHT, TAU = 0.5, 0.5  # of the published loss
BINS = 4  # parts of t for which the gradients are compared


def finite(x: Tensor) -> Tensor:
    """The features x. Raises DataError: they hold NaN or infinite values."""
    if not x.isfinite().all():
        raise DataError("the features hold NaN or infinite values: look at the network that they come from")
    return x


def centred(x: Tensor) -> Tensor:
    """Rows (..., N, D) minus their mean, in float64; done twice, since a large mean is rounded."""
    x = finite(x).double()
    x = x - x.mean(-2, keepdim=True)
    return x - x.mean(-2, keepdim=True)


def uniformity(x: Tensor, t: Sequence[float] = (2.0,)) -> Tensor:
    """log E exp(-t |u_i - u_j|^2) over i != j, u the directions about the mean, for each t (..., len(t)).

    Any isotropic set of high dimension is at the floor, -2 t + log 0F1(; D / 2; t^2), so this value says little.
    Wang & Isola, arXiv 2005.10242; their rows are raw.
    """
    u = F.normalize(centred(x), dim=-1)
    cosine = u @ u.mT
    cosine.diagonal(dim1=-2, dim2=-1).fill_(-math.inf)
    total = [torch.exp(2 * one * (cosine - 1)).sum((-2, -1)) for one in t]
    return torch.stack(total, -1).log() - math.log(cosine.shape[-1] * (cosine.shape[-1] - 1))


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


def spectrum(x: Tensor) -> Tensor:
    """Eigenvalues (..., min(N, D)) of the covariance of rows, largest first, from the smaller Gram matrix."""
    x = centred(x)
    N, D = x.shape[-2:]
    return torch.linalg.eigvalsh((x @ x.mT if N < D else x.mT @ x) / (N - 1)).flip(-1).clamp(min=0)


def entropy_rank(weights: Tensor) -> Tensor:
    """exp of the entropy of weights (..., k) scaled to sum 1: r for r equal weights.

    For variances it is also called effective rank. It is smaller than `rankme`, since the tail has less weight.
    """
    p = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.special.xlogy(p, p).sum(-1).neg().exp()


def rankme(eigenvalues: Tensor) -> Tensor:
    """`entropy_rank` of the singular values (RankMe, arXiv 2210.02885; effective rank of Roy & Vetterli, 2007; the
    `effective_rank` of the training log), here of centred rows. At most N - 1: 31 at N = 32 if the true one is 256.
    """
    return entropy_rank(eigenvalues.clamp(min=0).sqrt())


def two_nn(x: Tensor) -> Tensor:
    """Intrinsic dimension from the ratio of the second to the first neighbour's distance (Facco et al., 2017).

    The slope through the origin of -log(1 - F(mu)) against log mu, without the largest tenth of the ratios.
    """
    x = centred(x)  # otherwise cancellation in cdist's Gram matrix: float32 and a large mean lose two digits
    near = torch.cdist(x, x).topk(3, largest=False).values.clamp(min=1e-300)  # (..., N, 3), itself first
    ratio = (near[..., 2] / near[..., 1]).log().sort(-1).values  # log mu, rising
    kept = ratio[..., : int(ratio.shape[-1] * 0.9)]  # as Facco et al.: outliers would change the slope
    share = torch.arange(1, kept.shape[-1] + 1, dtype=kept.dtype, device=kept.device) / ratio.shape[-1]
    return (kept * -torch.log1p(-share)).sum(-1) / kept.square().sum(-1)


def token_structure(z: Tensor) -> Tensor:
    """Cosine of neighbouring tokens minus that of tokens at least half the grid apart, z (B, N, D) on a square grid.

    Each position's mean over the images is subtracted first, so that the fixed position code does not count. 0 if
    near and distant tokens are equally alike. It follows the index of iREPA for local and distant tokens.
    """
    u = F.normalize(centred(z.transpose(0, 1)).transpose(0, 1), dim=-1)
    grid = math.isqrt(z.shape[1])
    place = torch.cartesian_prod(*[torch.arange(grid, device=z.device)] * 2)
    steps = (place[:, None] - place).abs().sum(-1)  # (N, N), Manhattan
    cosine = (u @ u.mT).mean(0)
    return cosine[steps == 1].mean() - cosine[steps >= max(2, grid // 2)].mean()


def mean_pairwise(x: Tensor) -> Tensor:
    """Mean of |x_i - x_j|^2 / D over the pairs i != j, which is 2 tr S / D."""
    return 2 * finite(x).double().var(-2).mean(-1)


def mean_cosine(x: Tensor) -> Tensor:
    """Mean cosine over the pairs i != j of centred rows (..., N, D). For raw rows with a large mean it may be 1."""
    u, N = F.normalize(centred(x), dim=-1), x.shape[-2]
    return (u.sum(-2).square().sum(-1) - N) / (N * (N - 1))


def participation_ratio(x: Tensor) -> Tensor:
    """(tr S)^2 / tr S^2 of rows (..., N, D), numerator and denominator each without bias.

    Both are U-statistics over quadruples of rows (tr S^2 is the unbiased HSIC of x with itself, Song et al. 2012),
    written out in sums. The plain ratio is at most N - 1 for any true value.
    """
    x, n = centred(x), x.shape[-2]
    length = x.square().sum(-1)  # (..., N)
    s1, s2, f = length.sum(-1), length.square().sum(-1), (x.mT @ x).square().sum((-2, -1))
    count = n * (n - 1) * (n - 2) * (n - 3)
    square = ((n**2 - 3 * n + 1) * s1**2 - n * (n - 1) * s2 + 2 * f) / count
    trace = (f - s2 + s1**2 / ((n - 1) * (n - 2)) - 2 * s2 / (n - 2)) / (n * (n - 3))
    return square / trace


def class_scatter(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scatter of rows (..., N, D) within and between the classes of labels (N,), S_W and S_B (..., D, D), over N."""
    x, hot = centred(x), F.one_hot(labels).double()  # (N, K)
    count = hot.sum(0)[:, None]
    centre = hot.T @ x / count.clamp(min=1)  # (..., K, D)
    between = (centre * count).mT @ centre / len(labels)
    return x.mT @ x / len(labels) - between, between


def fisher_ratio(within: Tensor, between: Tensor) -> Tensor:
    """tr S_B / tr S_W: how far apart the classes are, in units of their width; 0 for labels at random."""
    return between.diagonal(dim1=-2, dim2=-1).sum(-1) / within.diagonal(dim1=-2, dim2=-1).sum(-1)


def nc1(within: Tensor, between: Tensor, classes: int) -> Tensor:
    """tr(S_W S_B^+) / K, which neural collapse sends to 0 (Papyan, Han & Donoho, arXiv 2008.08186)."""
    return (within * torch.linalg.pinv(between, hermitian=True, rtol=1e-9)).sum((-2, -1)) / classes


def cka_matrix(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Debiased linear CKA (a, b) of every block of x (a, N, D) with every block of y (b, N, E); y: None is x.

    HSIC_u(x, y) / sqrt(HSIC_u(x, x) HSIC_u(y, y)) (Kornblith et al., arXiv 1905.00414): 1 for y = s x Q + b, 0 in the
    mean for independent features. The plain estimate gives .86 for those at N = 64 and D = 384.
    Raises DataError: not the same images, or fewer than 4.
    """
    _check_same_images(x, y, 4)
    u = _unit(x)
    return u @ (u if y is None else _unit(y)).T


def _unit(x: Tensor) -> Tensor:
    """Gram matrices of x (blocks, N, D) as unit rows (blocks, N N), without diagonal, and centred without bias.

    <A, B> / (N (N - 3)) of such matrices is the unbiased HSIC of Song et al. (2012), by Székely & Rizzo (2014).
    """
    x, n = centred(x), x.shape[1]
    off = 1 - torch.eye(n, dtype=x.dtype, device=x.device)
    gram = x @ x.mT * off
    rows = gram.sum(-1, keepdim=True) / (n - 2)
    u = (gram - rows - rows.mT + gram.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2))) * off
    return F.normalize(u.flatten(1), dim=1)


def mutual_knn(x: Tensor, y: Tensor | None = None, k: int = 10) -> Tensor:
    """Mean share of the k nearest neighbours (a, b) that every block of x (a, N, D) has in common with each of y
    (b, N, E); y: None is x (Huh et al., arXiv 2405.07987). Random features share k / (N - 1).

    Raises DataError: not the same images, or not more than k.
    """
    _check_same_images(x, y, k + 1)
    near = _is_neighbour(x, k)
    return (near @ (near if y is None else _is_neighbour(y, k)).T / (k * x.shape[1])).double()


def _is_neighbour(x: Tensor, k: int) -> Tensor:
    """Whether row j is one of the k nearest other rows of row i, 0 or 1 (blocks, N N): sums are exact below 2^24."""
    found = []
    for block in x:
        rows = centred(block)
        near = torch.cdist(rows, rows).fill_diagonal_(torch.inf).topk(k, largest=False).indices
        found.append(torch.zeros(len(rows), len(rows), device=x.device).scatter_(1, near, 1.0).flatten())
    return torch.stack(found)


def _check_same_images(x: Tensor, y: Tensor | None, least: int) -> None:
    other = x.shape[1] if y is None else y.shape[1]
    if not least <= x.shape[1] == other:
        raise DataError(f"{x.shape[1]} and {other} rows: give features of the same images, at least {least}")


class Pull(NamedTuple):
    """Gradient of the weighted dispersive loss compared with that of the denoising loss, at the features.

    ratio: |g_disp| / |g_denoise|; cosine: between them, below 0 if they act against each other; each (bins of t,
    blocks). The first bin has the least noise.
    """

    ratio: Tensor
    cosine: Tensor


def gradient_pull(model: nn.Module, data: ImageSet, *, batches: int = 8) -> Pull:
    """Compare both gradients on `batches` batches of 64 as training draws them: times mixed, a tenth of labels dropped.

    The loss of each block is that of a tap at this block only, with the published weight and tau. Rows are put into
    four equal parts of t afterwards: a batch of a single t would have another loss.
    """
    objective, images, null = FlowMatching(), DeviceSet.of(data, "cpu"), getattr(model, "null_label", None)
    blocks = len(model.blocks)  # type: ignore[arg-type]
    features = torch.zeros(3, BINS, blocks, dtype=torch.double)
    for step in range(batches):
        batch = images.batch(objective, seed=0, step=step, size=64, null_label=null, drop_prob=0.1)
        loss, aux = objective(model, batch.x0, batch.y, draws=batch.draws, taps=range(blocks))
        part = (aux.t * BINS).long().clamp(max=BINS - 1)
        for b, z in enumerate(aux.taps):
            spread = WEIGHT * measure(finite(z), LossOptions("infonce_l2", TAU)).loss
            (d,), (g,) = (torch.autograd.grad(one, [z], retain_graph=True) for one in (spread, loss))
            d, g = d.flatten(1).double(), g.flatten(1).double()
            products = torch.stack([d.square().sum(1), g.square().sum(1), (d * g).sum(1)])  # (3, B)
            features[:, :, b].index_add_(1, part, products)
    dd, gg, dg = features
    return Pull((dd / gg).sqrt(), dg / (dd * gg).sqrt())
