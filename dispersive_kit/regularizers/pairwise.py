"""Sums over all pairs of rows, computed from one Gram matrix. The pairwise losses are built from these sums.

The released code uses `pdist`, which computes each pair separately and does not support half precision. The Gram
matrix of the centred rows is one matrix product, and its backward is another:
d/dx_i sum_ij f(|x_i - x_j|^2) = 4 sum_j f'_ij (x_i - x_j), a graph Laplacian times the rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WHOLE = 2**24  # up to so many entries, R x R is kept for backward; a larger one is computed in blocks, twice
BLOCK = 2**22  # entries of one block; a few matrices of 16 MiB exist at a time
SMALL = 2**22  # up to so many multiply-adds, a Gram product costs almost nothing more in float64
CORNER = 1024  # rows of the Gram matrix that are returned for statistics


class Kernel(NamedTuple):
    """f(u) of a pair and its derivative, u = |x_i - x_j|^2."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    log: bool = True  # summed as log sum exp f
    inner: bool = False  # u = <x_i, x_j> of the rows as they are, and the pairs i = j count too


class Pairs(NamedTuple):
    """Which pairs i != j count: those of two different classes y (R,), and with |t_i - t_j| <= t_window."""

    y: Tensor | None = None
    t: Tensor | None = None
    t_window: float = 0.0

    def dropped(self, i: int, j: int, like: Tensor) -> Tensor:
        """True (j - i, R) at the pairs of the rows i to j that do not count, their own diagonal included."""
        drop = torch.zeros_like(like, dtype=torch.bool)
        if self.y is not None:
            drop |= self.y[i:j, None] == self.y
        if self.t is not None:
            drop |= ~((self.t[i:j, None] - self.t).abs() <= self.t_window)  # a time that is NaN has no pairs
        drop.diagonal(i).fill_(True)
        return drop


def compute_dtype(z: Tensor) -> torch.dtype:
    """float64 for float64 and for small problems, float32 otherwise, whatever the precision of z (B, ...)."""
    small = len(z) * z.numel() <= SMALL and z.device.type != "mps"
    return torch.float64 if z.dtype == torch.float64 or small else torch.float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 or bf16 inside float32 products: distances are differences of large numbers."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


class PairSum(torch.autograd.Function):
    """Of rows x (R, D): (sum or log-sum-exp of the kernel over pairs, number dropped, corner of the Gram matrix).

    Call it inside `full_precision`. Saves for backward the centred rows and, up to `WHOLE` entries, f' of every pair.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Kernel, pairs: Pairs) -> tuple[Tensor, ...]:
        # A shift does not change distances, and the product of centred rows has four more correct digits.
        rows = x if kernel.inner else x - x.mean(0)
        squared = torch.linalg.vector_norm(rows, dim=1).square()  # (R,)
        blocks, weight, sums, drops, corner = _split(len(x)), None, [], [], None
        for i, j in blocks:
            gram = _symmetric_product(rows) if len(blocks) == 1 else rows[i:j] @ rows.T
            f, slope, dropped = _block(gram, squared, i, j, kernel, pairs)
            sums.append(_log_sum_exp(f) if kernel.log else f.sum())
            drops.append(dropped)
            if corner is None:
                n = min(len(x), CORNER)
                corner = gram if n == len(x) else gram[:n, :n].clone() if n <= j else rows[:n] @ rows[:n].T
            if len(blocks) == 1:
                weight = slope.mul_(f.sub_(sums[0]).exp_()) if kernel.log else slope
        total = torch.stack(sums).logsumexp(0) if kernel.log else torch.stack(sums).sum()
        ctx.kernel, ctx.pairs = kernel, pairs
        ctx.save_for_backward(rows, squared, total, weight)
        dropped = torch.stack(drops).sum()
        ctx.mark_non_differentiable(dropped, corner)
        return total, dropped, corner  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        # Raises in a second derivative also if `grad` is a constant; the result would silently lack this term.
        return PairSum._backward(ctx, grad.detach().requires_grad_() if torch.is_grad_enabled() else grad)

    @staticmethod
    @once_differentiable
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, squared, total, weight = ctx.saved_tensors
        kernel = ctx.kernel
        with full_precision(rows.device):
            if weight is not None:
                return _pull(weight, rows, 0, grad, kernel.inner), None, None
            out = torch.empty_like(rows)
            for i, j in _split(len(rows)):
                f, slope, _dropped = _block(rows[i:j] @ rows.T, squared, i, j, kernel, ctx.pairs)
                weight = slope.mul_(f.sub_(total).exp_()) if kernel.log else slope
                out[i:j] = _pull(weight, rows, i, grad, kernel.inner)
        return out, None, None


def _split(R: int) -> list[tuple[int, int]]:
    step = R if R * R <= WHOLE else max(1, BLOCK // R)
    return [(i, min(i + step, R)) for i in range(0, R, step)]


def _block(gram: Tensor, squared: Tensor, i: int, j: int, kernel: Kernel, pairs: Pairs) -> tuple[Tensor, ...]:
    """Kernel values and slopes (j - i, R) of the rows i to j, and how many of their pairs i != j were dropped."""
    if kernel.inner:
        return kernel.value(gram), kernel.slope(gram), gram.new_zeros(())
    u = gram.mul(-2).add_(squared).add_(squared[i:j, None]).clamp_(min=0)
    f, slope = kernel.value(u), kernel.slope(u)
    drop = pairs.dropped(i, j, f)
    f.masked_fill_(drop, float("-inf") if kernel.log else 0.0)
    return f, slope.masked_fill_(drop, 0.0), drop.sum() - (j - i)


def _symmetric_product(rows: Tensor) -> Tensor:
    """rows @ rows.T (R, R) for five eighths of the work: four strips of the lower triangle, mirrored."""
    R = len(rows)
    gram = rows.new_empty(R, R)
    step = max(64, -(-R // 4))
    for i in range(0, R, step):
        strip = rows[i:] @ rows[i : i + step].T
        gram[i:, i : i + step] = strip
        gram[i : i + step, i:] = strip.T
    return gram


def _log_sum_exp(f: Tensor) -> Tensor:
    """log-sum-exp of f; where no pair counts it is finite, and its softmax is zero."""
    info = torch.finfo(f.dtype)
    top = f.max().clamp(min=info.min / 2)
    return (f - top).exp_().sum().clamp(min=info.tiny).log() + top


def _pull(weight: Tensor, rows: Tensor, i: int, grad: Tensor, inner: bool) -> Tensor:
    """Gradient (b, D) of the rows i to i + b, from the derivatives f' (b, R), symmetric over all, of their pairs."""
    if inner:
        return (weight * (2 * grad)) @ rows
    laplacian = weight * (-4 * grad)
    laplacian.diagonal(i).sub_(laplacian.sum(1))
    return laplacian @ rows
