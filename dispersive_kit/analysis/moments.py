"""Sums over rows, streamed in one pass: everything about a set of features that its covariance and class means tell.

Each measure takes leading axes too, so that all blocks of a network are done at once: rows (..., N, D).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dispersive_kit.errors import DataError


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
        if self.n < 2:
            raise DataError(f"a covariance of {self.n} rows: give at least 2")
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
