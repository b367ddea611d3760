"""How alike two sets of features of the same images are, whatever their rotation, scale and width."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dispersive_kit.analysis.geometry import centred
from dispersive_kit.errors import DataError


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
    (b, N, E); y: None is x (Huh et al., arXiv 2405.07987). Features at random share k / (N - 1).

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
