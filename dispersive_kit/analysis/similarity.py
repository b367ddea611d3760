"""How alike two sets of features of the same images are, whatever their rotation, scale and width."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dispersive_kit.analysis.dispersion import centred
from dispersive_kit.errors import DataError


def u_centred(gram: Tensor) -> Tensor:
    """Gram matrices (..., N, N) without diagonal, rows and columns centred without bias (Székely & Rizzo, 2014).

    <A, B> / (N (N - 3)) is then the unbiased HSIC of Song et al. (2012).
    """
    n = gram.shape[-1]
    if n < 4:
        raise DataError(f"debiased CKA of {n} images: give at least 4")
    off = 1 - torch.eye(n, dtype=gram.dtype, device=gram.device)
    k = gram * off
    rows = k.sum(-1, keepdim=True) / (n - 2)
    return (k - rows - rows.mT + k.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2))) * off


def cka_matrix(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Debiased linear CKA (a, b) of every block of x (a, N, D) with every block of y (b, N, E); y: None is x.

    HSIC_u(x, y) / sqrt(HSIC_u(x, x) HSIC_u(y, y)) (Kornblith et al., arXiv 1905.00414): 1 for y = s x Q + b, 0 in the
    mean for independent features. The plain estimate gives .86 for those at N = 64 and D = 384.
    """
    u = _unit(x)
    return u @ (u if y is None else _unit(y)).T


def _unit(x: Tensor) -> Tensor:
    """U-centred Gram matrices of x (blocks, N, D) as unit rows (blocks, N N)."""
    x = centred(x)
    return F.normalize(u_centred(x @ x.mT).flatten(1), dim=1)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Debiased linear CKA of features x (N, D) and y (N, E) of the same N images; see `cka_matrix`."""
    if len(x) != len(y):
        raise DataError(f"CKA compares features of the same images, and was given {len(x)} and {len(y)} rows")
    return float(cka_matrix(x[None], y[None]))


def mutual_knn(x: Tensor, y: Tensor, k: int = 10) -> float:
    """Mean share of the k nearest neighbours that x (N, D) and y (N, E) have in common (Huh et al., arXiv 2405.07987).

    Features at random share k / (N - 1).
    """
    if not 0 < k < len(x) == len(y):
        raise DataError(f"{k} neighbours of {len(x)} and {len(y)} rows: give the same images, more than k")
    first, second = (is_neighbour(z, k) for z in (x, y))
    return float((first & second).sum() / (k * len(x)))


def neighbours(x: Tensor, k: int) -> Tensor:
    """Indices (N, k) of the k nearest other rows, the nearest first."""
    x = centred(x)
    return torch.cdist(x, x).fill_diagonal_(torch.inf).topk(k, largest=False).indices


def is_neighbour(x: Tensor, k: int) -> Tensor:
    """Whether row j is one of the k nearest other rows of row i, bool (N, N)."""
    return torch.zeros(len(x), len(x), dtype=torch.bool, device=x.device).scatter_(1, neighbours(x, k), True)


def shared_neighbours(x: Tensor, k: int = 10) -> Tensor:
    """`mutual_knn` (blocks, blocks) of every two blocks of x (blocks, N, D)."""
    members = torch.stack([is_neighbour(one, k) for one in x]).flatten(1).float()  # (blocks, N N), exact below 2^24
    return (members @ members.T / (k * x.shape[1])).double()
