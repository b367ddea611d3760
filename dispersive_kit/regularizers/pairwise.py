"""Sums over all pairs of rows through one Gram product: what the pairwise losses are made of.

The released code takes `pdist`, which keeps B (B - 1) / 2 differences apart and has no half precision. A Gram
product of the centred rows is a matrix product, and its backward is one more:
d/dx_i sum_ij f(|x_i - x_j|^2) = 4 sum_j f'_ij (x_i - x_j), a graph Laplacian times the rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WHOLE = 2**24  # entries of the B x B matrix kept for backward; beyond it, rows are done in blocks and redone
SMALL = 2**22  # multiply-adds up to which float64 costs next to nothing


class Kernel(NamedTuple):
    """f(u) of a pair with its derivative; u is |x_i - x_j|^2, or <x_i, x_j> when `inner` (diagonal included).

    `log`: the sum is taken as log sum exp f.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    log: bool = True
    inner: bool = False


class Pairs(NamedTuple):
    """Which pairs i != j count: not those of one class `y`, only those with |t_i - t_j| <= t_window."""

    y: Tensor | None = None
    t: Tensor | None = None
    t_window: float = 0.0

    def dropped(self, i: int, j: int, inner: bool) -> Tensor | None:
        """Pairs (j - i, B) that do not count, for the rows i to j; None where all do."""
        if inner:
            return None
        label = self.y if self.y is not None else self.t
        if label is None:
            return None
        drop = torch.zeros(j - i, len(label), dtype=torch.bool, device=label.device)
        if self.y is not None:
            drop |= self.y[i:j, None] == self.y
        if self.t is not None:
            drop |= (self.t[i:j, None] - self.t).abs() > self.t_window
        return drop


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 and for small problems, float32 otherwise, whatever the precision of `x`."""
    small = len(x) * x.numel() <= SMALL and x.device.type != "mps"
    return torch.float64 if x.dtype == torch.float64 or small else torch.float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 or bf16 inside float32 products: distances are differences of large numbers."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class PairSum(torch.autograd.Function):
    """(sum or log-sum-exp of the kernel over the pairs, number of pairs, a corner of the Gram matrix).

    Keeps the centred rows (B, D), and B x B weights unless B x B exceeds `WHOLE`: then blocks of rows are
    worked out in forward and again in backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Kernel, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        with full_precision(x.device):
            # Distances do not see a shift, and a Gram product of centred rows has four digits more.
            rows = x if kernel.inner else x - x.mean(0)  # (B, D)
            squared = torch.linalg.vector_norm(rows, dim=1).square()  # (B,)
            blocks = split(len(rows))
            sums, counts, corner, weight = [], [], None, None
            for i, j in blocks:
                f, slope, gram, count = block(rows, squared, i, j, kernel, pairs)
                corner = gram[:, : len(gram)].clone() if corner is None else corner
                sums.append(log_sum_exp(f) if kernel.log else f.sum())
                counts.append(count)
                if len(blocks) == 1:
                    weight = slope.mul_(torch.exp(f - sums[0])) if kernel.log else slope
            total = torch.stack(sums).logsumexp(0) if kernel.log else torch.stack(sums).sum()
        count = torch.stack(counts).sum()
        ctx.kernel, ctx.pairs = kernel, pairs
        ctx.save_for_backward(rows, squared, total, weight)
        ctx.mark_non_differentiable(count, corner)
        return total, count, corner  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        rows, squared, total, weight = ctx.saved_tensors
        with full_precision(rows.device):
            if weight is not None:
                return pull(weight, rows, 0, grad, ctx.kernel.inner), None, None
            out = torch.empty_like(rows)
            for i, j in split(len(rows)):
                f, slope, _gram, _count = block(rows, squared, i, j, ctx.kernel, ctx.pairs)
                if ctx.kernel.log:
                    slope.mul_(f.sub_(total).exp_())
                out[i:j] = pull(slope, rows, i, grad, ctx.kernel.inner)
        return out, None, None


def split(B: int) -> list[tuple[int, int]]:
    step = B if B * B <= WHOLE else max(1, WHOLE // B)
    return [(i, min(i + step, B)) for i in range(0, B, step)]


def block(
    rows: Tensor, squared: Tensor, i: int, j: int, kernel: Kernel, pairs: Pairs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernel values and slopes, Gram product, all (j - i, B), and the number of pairs, of the rows i to j."""
    gram = rows[i:j] @ rows.T
    u = gram
    if not kernel.inner:
        u = gram.mul(-2).add_(squared).add_(squared[i:j, None]).clamp_(min=0)
    f, slope = kernel.value(u), kernel.slope(u)
    drop = pairs.dropped(i, j, kernel.inner)
    if not kernel.inner:
        own = torch.zeros_like(f, dtype=torch.bool) if drop is None else drop
        own.diagonal(i).fill_(True)
        f.masked_fill_(own, float("-inf") if kernel.log else 0.0)
        slope.masked_fill_(own, 0.0)
        count = own.numel() - own.sum()
    else:
        count = torch.tensor(f.numel(), device=f.device)
    return f, slope, gram, count


def log_sum_exp(f: Tensor) -> Tensor:
    """Finite, and its softmax zero, where no pair counts."""
    top = f.max().clamp(min=torch.finfo(f.dtype).min / 2)
    return (f - top).exp_().sum().clamp(min=torch.finfo(f.dtype).tiny).log() + top


def pull(weight: Tensor, rows: Tensor, i: int, grad: Tensor, inner: bool) -> Tensor:
    """Gradient (b, D) of the rows i to i + b, from the weights f' (b, B) of their pairs (symmetric)."""
    if inner:
        return (weight * (2 * grad)) @ rows
    laplacian = weight * (-4 * grad)
    laplacian.diagonal(i).sub_(laplacian.sum(1))
    return laplacian @ rows
