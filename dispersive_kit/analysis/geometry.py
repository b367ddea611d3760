"""The geometry of one set of features: how far apart rows lie, in which directions, what of it is signal, what pulls.

Rows (..., N, D) are images after pooling; everything is worked out in float64 and, but where it says "raw", about the
mean row. Leading axes (blocks) are kept. What needs only a covariance or class means is streamed, by `Moments`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispersive_kit.data import ImageSet
from dispersive_kit.diffusion.objectives import FlowMatching
from dispersive_kit.regularizers.losses import LossOptions, measure
from dispersive_kit.training.batches import DeviceSet

TWONN_DISCARD = 0.1  # the share of largest ratios that Facco et al. leave out: outliers bend the line
BINS = 4  # parts of t for which the gradients are compared


def centred(x: Tensor) -> Tensor:
    """Rows (..., N, D) less their mean, in float64; twice, since the first mean is rounded where it is large."""
    x = x.double()
    x = x - x.mean(-2, keepdim=True)
    return x - x.mean(-2, keepdim=True)


def uniformity(x: Tensor, t: Sequence[float] = (2.0,)) -> Tensor:
    """log E exp(-t |u_i - u_j|^2) over i != j, u the directions about the mean, for each t (..., len(t)).

    Any isotropic cloud of high dimension is at the floor, -2 t + log 0F1(; D / 2; t^2), so being there says little.
    Wang & Isola, arXiv 2005.10242; theirs is raw.
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
    """Eigenvalues (..., min(N, D)) of the covariance of rows, falling, through the smaller of the two products."""
    x = centred(x)
    N, D = x.shape[-2:]
    product = x @ x.mT if N < D else x.mT @ x
    return torch.linalg.eigvalsh(product / (N - 1)).flip(-1).clamp(min=0)


def entropy_rank(weights: Tensor) -> Tensor:
    """exp of the entropy of weights (..., k) scaled to sum 1: r for r equal ones.

    Of variances it is also called effective rank, and smaller than `rankme`, since it weighs the tail less.
    """
    p = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.special.xlogy(p, p).sum(-1).neg().exp()


def rankme(eigenvalues: Tensor) -> Tensor:
    """`entropy_rank` of the singular values (RankMe, arXiv 2210.02885; effective rank of Roy & Vetterli, 2007; the
    `effective_rank` of the training log), here of centred rows. At most N - 1: 31 at N = 32 for a true 256.
    """
    return entropy_rank(eigenvalues.clamp(min=0).sqrt())


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


class Moments:
    """Centred second moments, in float64, of rows (..., N, D) that come in batches of any size.

    The sums are about a fixed shift, the first batch's mean: about zero, a large mean channel would leave few digits.
    """

    def __init__(self, num_classes: int = 0) -> None:
        self.n, self.num_classes = 0, num_classes

    def update(self, x: Tensor, labels: Tensor | None = None) -> None:
        """Add rows x (..., B, D), and with classes their labels (B,)."""
        x = x.double()
        if not self.n:
            self._start(x)
        y = x - self.shift  # (..., B, D)
        a = y.square().sum(-1, keepdim=True)  # (..., B, 1)
        self.n += y.shape[-2]
        self.total += y.sum(-2)
        self.outer += y.mT @ y
        self.a_total += a.sum((-2, -1))
        self.a_square += a.square().sum((-2, -1))
        self.a_rows += (a * y).sum(-2)
        self.directions += F.normalize(x, dim=-1).sum(-2)
        if labels is not None:
            hot = F.one_hot(labels, self.num_classes).to(y)  # (B, K)
            self.class_total += hot.T @ y
            self.class_count += hot.sum(0)

    def _start(self, x: Tensor) -> None:
        *lead, _, D = x.shape
        self.shift = x.mean(-2, keepdim=True)
        self.total, self.a_rows, self.directions = (x.new_zeros(*lead, D) for _ in range(3))
        self.outer = x.new_zeros(*lead, D, D)
        self.a_total, self.a_square = x.new_zeros(lead), x.new_zeros(lead)
        self.class_total, self.class_count = x.new_zeros(*lead, self.num_classes, D), x.new_zeros(self.num_classes)

    @property
    def offset(self) -> Tensor:
        """Mean less the shift (..., D)."""
        return self.total / self.n

    @property
    def mean(self) -> Tensor:
        return self.shift.squeeze(-2) + self.offset  # (..., D)

    @property
    def scatter(self) -> Tensor:
        """Sum of the centred outer products (..., D, D)."""
        return self.outer - self.n * self.offset[..., :, None] * self.offset[..., None, :]

    @property
    def covariance(self) -> Tensor:
        return self.scatter / (self.n - 1)

    def norms(self) -> tuple[Tensor, Tensor]:
        """Sums over rows of |x - mean|^2 and of |x - mean|^4 (...)."""
        d, n = self.offset, self.n
        d2, da = d.square().sum(-1), (d * self.a_rows).sum(-1)
        quadratic = torch.einsum("...i,...ij,...j->...", d, self.outer, d)
        fourth = self.a_square + 4 * quadratic - 4 * da + 2 * d2 * self.a_total - 3 * n * d2.square()
        return self.a_total - n * d2, fourth

    def mean_pairwise(self) -> Tensor:
        """Mean of |x_i - x_j|^2 / D over the pairs i != j, which is 2 tr S / D."""
        return 2 * self.covariance.diagonal(dim1=-2, dim2=-1).mean(-1)

    def mean_cosine(self) -> Tensor:
        """Mean cosine over the pairs i != j of the rows as they are, without centring."""
        return (self.directions.square().sum(-1) - self.n) / (self.n * (self.n - 1))

    def participation_ratio(self) -> Tensor:
        """(tr S)^2 / tr S^2, numerator and denominator each without bias.

        Both are U-statistics over quadruples of rows (tr S^2 is the unbiased HSIC of x with itself, Song et al. 2012),
        written out in sums. The plain ratio is at most N - 1 whatever the truth.
        """
        s1, s2 = self.norms()
        n, f = self.n, self.scatter.square().sum((-2, -1))
        count = n * (n - 1) * (n - 2) * (n - 3)
        square = ((n**2 - 3 * n + 1) * s1**2 - n * (n - 1) * s2 + 2 * f) / count
        trace = (f - s2 + s1**2 / ((n - 1) * (n - 2)) - 2 * s2 / (n - 2)) / (n * (n - 3))
        return square / trace

    def class_scatter(self) -> tuple[Tensor, Tensor]:
        """Scatter within and between classes, S_W and S_B (..., D, D), each over N."""
        centre = self.class_total / self.class_count.clamp(min=1)[:, None] - self.offset[..., None, :]  # (..., K, D)
        between = (centre * self.class_count[:, None]).mT @ centre / self.n
        return self.scatter / self.n - between, between

    def fisher_ratio(self) -> Tensor:
        """tr S_B / tr S_W: how far apart the classes are, in units of their width; 0 for labels at random."""
        within, between = (s.diagonal(dim1=-2, dim2=-1).sum(-1) for s in self.class_scatter())
        return between / within

    def nc1(self) -> Tensor:
        """tr(S_W S_B^+) / K, which neural collapse sends to 0 (Papyan, Han & Donoho, arXiv 2008.08186)."""
        within, between = self.class_scatter()
        inverse = torch.linalg.pinv(between, hermitian=True, rtol=1e-9)
        return (within * inverse).sum((-2, -1)) / int((self.class_count > 0).sum())


@dataclass(frozen=True)
class Pull:
    """Gradient of the weighted dispersive loss against that of the denoising loss, at the features.

    ratio: |g_disp| / |g_denoise|; cosine: between them, below 0 where they pull apart; each (bins of t, blocks), the
    first bin being the least noise. weights_cosine: between the gradients by each block's own weights (blocks,).
    """

    ratio: Tensor
    cosine: Tensor
    weights_cosine: Tensor


def gradient_pull(
    model: nn.Module, data: ImageSet, *, weight: float = 0.5, options: LossOptions | None = None, batches: int = 8
) -> Pull:
    """Compare both gradients on `batches` batches of 64 as training draws them: times mixed, a tenth of labels dropped.

    The loss of each block is that of a tap on this block alone. Rows are put into four equal parts of t afterwards: a
    batch of one t would be another loss. options: of the dispersive loss, tau 0.5 by default.
    """
    options, objective = options or LossOptions("infonce_l2", 0.5), FlowMatching()
    images, blocks = DeviceSet.of(data, "cpu"), list(model.blocks)  # type: ignore[arg-type]
    null = getattr(model, "null_label", None)
    features = torch.zeros(3, BINS, len(blocks), dtype=torch.double)
    weights, whole = torch.zeros(3, len(blocks), dtype=torch.double), torch.zeros(1, dtype=torch.long)
    for step in range(batches):
        batch = images.batch(objective, seed=0, step=step, size=64, null_label=null, drop_prob=0.1)
        loss, aux = objective(model, batch.x0, batch.y, draws=batch.draws, taps=range(len(blocks)))
        part = (aux.t * BINS).long().clamp(max=BINS - 1)
        for b, (z, block) in enumerate(zip(aux.taps, blocks, strict=True)):
            wanted = [z, *block.parameters()]
            spread = weight * measure(z, options).loss
            d, *d_weights = torch.autograd.grad(spread, wanted, retain_graph=True)
            g, *g_weights = torch.autograd.grad(loss, wanted, retain_graph=True)
            features[:, :, b] += _products(d, g, part, BINS)
            weights[:, b] += _products(_joined(d_weights), _joined(g_weights), whole, 1)[:, 0]
    (dd, gg, dg), (ww, vv, wv) = features, weights
    return Pull((dd / gg).sqrt(), dg / (dd * gg).sqrt(), wv / (ww * vv).sqrt())


def _products(d: Tensor, g: Tensor, part: Tensor, bins: int) -> Tensor:
    """|d|^2, |g|^2 and <d, g> (3, bins) of gradients (B, ...), summed over the rows of each part."""
    d, g = d.flatten(1).double(), g.flatten(1).double()
    rows = torch.stack([d.square().sum(1), g.square().sum(1), (d * g).sum(1)])  # (3, B)
    return rows.new_zeros(3, bins).index_add_(1, part, rows)


def _joined(tensors: list[Tensor]) -> Tensor:
    """All entries as one row (1, n)."""
    return torch.cat([tensor.flatten() for tensor in tensors])[None]
