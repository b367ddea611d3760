"""The Dispersive Loss family as pure functions of a batch of features.

Wang & He, "Diffuse and Disperse", arXiv 2506.09027. No positive pairs, no parameters, no random numbers.
"""

import difflib
import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DispersiveError
from .pairwise import Kernel, Pairs, PairSum, compute_dtype, full_precision

EPS = 1e-12


class Kind(NamedTuple):
    tau: float | None  # default of the one scale; None: the kind has none
    diagonal: bool  # default
    unit: bool = False  # rows are put on the unit sphere
    log: bool = False  # log-mean-exp of -D / tau, rather than a mean


KINDS = {
    "infonce_l2": Kind(0.5, True, log=True),
    "infonce_cosine": Kind(0.5, True, unit=True, log=True),
    "sphere": Kind(0.5, False, unit=True, log=True),
    "angular": Kind(0.5, False, unit=True, log=True),
    "hinge": Kind(1.0, False),
    "covariance": Kind(None, True),
    "vicreg": Kind(1.0, False),
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"kind": "infonce_l2", "weight": 0.5, "tau": 0.5, "depth": 1 / 4},  # JAX, local batch 16
    "official-pytorch": {"kind": "infonce_l2", "weight": 0.25, "tau": 1.0, "depth": 1.0},  # local batch 32
    # For small models and short runs: the setting that harmed least in our pilot on 8 x 8 digits (Frechet
    # distance 22.5 against 21.3 and 23.7 without the loss; `paper` 226). Not better than none.
    "small": {"kind": "infonce_cosine", "weight": 0.05, "tau": 0.5, "pool": "mean", "depth": 1 / 4},
}


@dataclass(frozen=True)
class LossOptions:
    """The options of `dispersive_loss`, checked; see there."""

    kind: str = "infonce_l2"
    tau: float | str | None = None
    diagonal: bool | None = None
    pool: str = "none"
    normalize: str = "none"
    norm_penalty: float = 0.0
    t_window: float | None = None
    ignore_same_class: bool = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, tuple(KINDS))
        check_choice("pool", self.pool, ("none", "mean", "tokens"))
        check_choice("normalize", self.normalize, ("none", "layer", "unit"))
        self._check_tau()
        check_number("norm_penalty", self.norm_penalty, at_least=0.0)
        if self.t_window is not None:
            check_number("t_window", self.t_window, above=0.0)
        if self.kind in ("covariance", "vicreg") and (self.t_window is not None or self.ignore_same_class):
            raise DispersiveError(
                f"kind {self.kind!r} compares features, not pairs of images: t_window and "
                "ignore_same_class have "
                "no meaning for it; leave them out or take a pairwise kind such as 'infonce_l2'"
            )
        for name in ("diagonal", "ignore_same_class"):
            if getattr(self, name) not in (True, False, None):
                raise DispersiveError(f"{name} is {getattr(self, name)!r}: give True or False")

    def _check_tau(self) -> None:
        if self.tau is None:
            return
        if KINDS[self.kind].tau is None:
            raise DispersiveError(f"kind {self.kind!r} has no scale: leave tau out (it was {self.tau!r})")
        if self.tau == "auto" and self.kind != "vicreg":
            return
        check_number("tau", self.tau, above=0.0, words="" if self.kind == "vicreg" else " or 'auto'")

    @classmethod
    def of(cls, options: dict[str, Any]) -> "LossOptions":
        known = [f.name for f in fields(cls)]
        for name in options:
            check_choice("option", name, known)
        return cls(**options)

    @property
    def scale(self) -> float | str | None:
        return KINDS[self.kind].tau if self.tau is None else self.tau

    @property
    def with_diagonal(self) -> bool:
        return KINDS[self.kind].diagonal if self.diagonal is None else self.diagonal


def check_choice(what: str, value: Any, known: Any) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DispersiveError(f"unknown {what} {value!r}{hint} Choose from {', '.join(known)}.")


def check_number(
    what: str, value: Any, above: float | None = None, at_least: float | None = None, words: str = ""
) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and (above is None or value > above) and (at_least is None or value >= at_least):
        return
    bound = f"above {above:g}" if above is not None else f"of at least {at_least:g}"
    raise DispersiveError(f"{what} is {value!r}: give a finite number {bound}{words}")


class Measured(NamedTuple):
    """The loss (0-d, differentiable) and, detached, what `Stats` shows."""

    loss: Tensor
    pairs: Tensor  # pairs in the mean, the diagonal included if it counts
    off_diagonal_mass: Tensor  # share of sum exp(-D / tau) that pairs i != j hold; nan where there is no exp
    tau: Tensor
    feature_rms: Tensor
    gram: Tensor  # of the rows the loss saw, or of the first of them where the batch is large
    rows: int
    dim: int


def dispersive_loss(z: Tensor, *, t: Tensor | None = None, y: Tensor | None = None, **options: Any) -> Tensor:
    """Dispersive Loss of features z (B, ...), a 0-d tensor, float32 (float64 for float64 z), to be minimised."""
    return measure(z, LossOptions.of(options), t=t, y=y).loss


def measure(z: Tensor, options: LossOptions, *, t: Tensor | None = None, y: Tensor | None = None) -> Measured:
    """`dispersive_loss` with what came out on the way."""
    check_features(z, t, y)
    out_dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    with full_precision(z.device):
        rms = torch.linalg.vector_norm(z.detach(), dtype=out_dtype) / math.sqrt(z.numel())
        x = rows_of(z, options)  # (R, D)
        pairs = select_pairs(options, t, y, len(x) // len(z))
        if options.kind in ("covariance", "vicreg"):
            loss, gram = decorrelation(x, options)
            nan = torch.full((), math.nan, device=z.device)
            count, mass, tau = torch.tensor(len(x), device=z.device), nan, nan
        else:
            tau = temperature(x, options)
            loss, count, mass, gram = pairwise(x, options, tau, pairs)
        if options.norm_penalty:
            loss = loss + options.norm_penalty * x.square().mean()
    return Measured(loss.to(out_dtype), count, mass.detach(), tau, rms, gram, rows=len(x), dim=x.shape[1])


def check_features(z: Any, t: Any, y: Any) -> None:
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.layout != torch.strided:
        kind = f"{z.dtype} {z.layout} tensor" if isinstance(z, Tensor) else type(z).__name__
        raise DispersiveError(f"features must be a dense tensor of floating point, not a {kind}")
    if z.ndim < 2 or z.numel() == 0:
        raise DispersiveError(
            f"features of shape {tuple(z.shape)}: expected (B, ...) with B and the rest not 0"
        )
    for name, label in (("t", t), ("y", y)):
        if label is not None and (not isinstance(label, Tensor) or label.shape != z.shape[:1]):
            given = tuple(label.shape) if isinstance(label, Tensor) else type(label).__name__
            raise DispersiveError(
                f"{name} is {given} beside features {tuple(z.shape)}: expected a tensor ({len(z)},). If "
                "the first "
                "axis of the features is not the batch, turn it with select="
            )


def rows_of(z: Tensor, options: LossOptions) -> Tensor:
    """Rows (R, D) for the pairs: pooled over tokens and normalised, in the precision of the computation."""
    if options.pool != "none" or options.normalize == "layer":
        z = z.flatten(2).transpose(1, 2) if z.ndim > 3 else z.reshape(len(z), -1, z.shape[-1])  # (B, N, C)
    dtype = compute_dtype(z.flatten(1))
    if options.normalize == "layer":
        z = F.layer_norm(z.to(dtype), z.shape[-1:], eps=1e-6)
    if options.pool == "mean":
        z = z.mean(1, dtype=dtype)
    x = (z.flatten(0, 1) if options.pool == "tokens" else z.flatten(1)).to(dtype)  # (R, D)
    if options.normalize == "unit":  # RMS 1, so that the /dim of the l2 kinds leaves 2 - 2 cos
        x = F.normalize(x, dim=1, eps=EPS) * math.sqrt(x.shape[1])
    return F.normalize(x, dim=1, eps=EPS) if KINDS[options.kind].unit else x


def select_pairs(options: LossOptions, t: Tensor | None, y: Tensor | None, tokens: int) -> Pairs:
    for option, label, name in ((options.ignore_same_class, y, "y"), (options.t_window, t, "t")):
        if option and label is None:
            raise DispersiveError(
                f"{'ignore_same_class' if name == 'y' else 't_window'} needs {name}: pass {name}= with the "
                "features"
            )
    return Pairs(
        y=y.repeat_interleave(tokens) if options.ignore_same_class and y is not None else None,
        t=t.repeat_interleave(tokens) if options.t_window and t is not None else None,
        t_window=options.t_window or 0.0,
    )


def temperature(x: Tensor, options: LossOptions) -> Tensor:
    """tau as a tensor; "auto" is the median distance of the pairs (of the first 512 rows), held constant."""
    if options.scale != "auto":
        return torch.tensor(options.scale, dtype=x.dtype, device=x.device)
    rows = x.detach()[:512]
    rows = rows - rows.mean(0)
    gram = rows @ rows.T
    i, j = torch.triu_indices(len(rows), len(rows), 1, device=x.device)
    squared = (gram.diagonal()[i] + gram.diagonal()[j] - 2 * gram[i, j]).clamp(min=0)
    return distance(squared, options.kind, x.shape[1]).nanmedian().nan_to_num(1.0).clamp(min=EPS)


def distance(u: Tensor, kind: str, dim: int) -> Tensor:
    """D >= 0 of the kind, from the squared l2 distance u of two rows; for infonce_cosine it is 1 - cos."""
    if kind == "infonce_cosine":
        return u / 2
    if kind == "angular":
        return half_chord(u).asin() * (2 / math.pi)
    return u if kind == "sphere" else u / dim


def half_chord(u: Tensor) -> Tensor:
    """sin(theta / 2) of two unit rows, kept off 0 and 1, where the angle has no derivative."""
    return u.clamp(min=1e-12).sqrt().div(2).clamp(max=1 - 1e-7)


def kernel_of(kind: str, tau: Tensor, dim: int) -> Kernel:
    if kind == "hinge":
        return Kernel(
            lambda u: (tau - u / dim).clamp(min=0).square(),
            lambda u: (tau - u / dim).clamp(min=0) * (-2 / dim),
            log=False,
        )
    if kind == "angular":
        return Kernel(lambda u: distance(u, kind, dim) / -tau, lambda u: angular_slope(u) / -tau)
    slope = distance(torch.ones((), dtype=tau.dtype, device=tau.device), kind, dim) / -tau
    shift = 1 / tau if kind == "infonce_cosine" else torch.zeros_like(tau)  # D = -cos = |u - u'|^2 / 2 - 1
    return Kernel(lambda u: u * slope + shift, lambda u: slope.expand_as(u).clone())


def angular_slope(u: Tensor) -> Tensor:
    s = half_chord(u)  # theta = 2 asin s, s^2 = u / 4
    return 1 / (4 * math.pi * s * (1 - s.square()).sqrt())


def pairwise(
    x: Tensor, options: LossOptions, tau: Tensor, pairs: Pairs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, pairs, off-diagonal mass, Gram). The diagonal, where D = 0 exactly, is added in closed form."""
    kernel = kernel_of(options.kind, tau, x.shape[1])
    total, off, gram = PairSum.apply(x, kernel, pairs)
    own = len(x) if options.with_diagonal else 0
    count = off + own
    at_zero = kernel.value(torch.zeros((), dtype=x.dtype, device=x.device))
    if not kernel.log:
        nan = torch.full((), math.nan, device=x.device)
        return (total + own * at_zero) / count.clamp(min=1), count, nan, gram
    mass = torch.ones((), dtype=x.dtype, device=x.device)
    if own:  # exp(L_incl) = 1/B + (1 - 1/B) exp(L_excl)
        diagonal = at_zero + math.log(own)
        mass = torch.sigmoid(total - diagonal)
        total = torch.logaddexp(total, diagonal)
    loss = total - count.clamp(min=1).to(total.dtype).log()
    return torch.where(count > 0, loss, 0.0 * total), count, mass, gram


def decorrelation(x: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(loss, Gram) of the covariance and vicreg kinds."""
    B, dim = x.shape
    x = x - x.mean(0)
    x = (x - x.mean(0)) / math.sqrt(B - 1)  # twice: the first mean is rounded by a large offset
    variance = x.square().sum(0)  # (D,)
    if options.kind == "covariance":
        x = x / (variance + EPS).sqrt()
    square = Kernel(lambda g: g.square(), lambda g: 2 * g, log=False, inner=True)
    total, _count, gram = PairSum.apply(x, square, Pairs())  # ||X X^T||_F^2 = ||X^T X||_F^2 = sum_mn C_mn^2
    if not options.with_diagonal:
        total = total - x.square().sum(0).square().sum()
    if options.kind == "covariance":
        return total / dim**2, gram
    spread = (options.scale - (variance + 1e-4).sqrt()).clamp(min=0).mean()  # type: ignore[operator]
    return spread + total / (25 * dim), gram


def floor(
    kind: str,
    batch: int,
    tau: float | None = None,
    *,
    diagonal: bool | None = None,
    dim: int | None = None,
    pairs: int | None = None,
) -> float:
    """Greatest known lower bound of the loss for a batch; -inf where there is none.

    `pairs`, where some were ignored, is the number left, the diagonal included if it counts; `dim` sharpens
    the covariance kind.
    """
    options = LossOptions(kind=kind, tau=tau, diagonal=diagonal)
    scale = float(options.scale or 0.0)
    own = batch if options.with_diagonal else 0
    masked = pairs is not None and pairs != batch * (batch - 1) + own
    total = max(1, pairs if masked and pairs is not None else batch * (batch - 1) + own)
    share = own / total  # of the diagonal
    if kind in ("vicreg", "hinge"):
        return share * scale**2 if kind == "hinge" else 0.0
    if kind == "covariance":
        rank = min(batch - 1, dim) if dim else batch - 1
        return 1 / rank - (0 if options.with_diagonal else 1 / (dim or math.inf))
    if kind == "infonce_l2":
        return math.log(share) if share else -math.inf
    largest = largest_distance(kind, 2 if masked else batch)
    at_zero = 1 / scale if kind == "infonce_cosine" else 0.0
    return math.log(share * math.exp(at_zero) + (1 - share) * math.exp(-largest / scale))


def largest_distance(kind: str, B: int) -> float:
    """Of all mean distances over the pairs i != j, by Jensen the bound of the log-mean-exp."""
    if kind == "angular":  # a random plane parts at most floor(B^2 / 4) of the B (B - 1) / 2 pairs
        return (B * B // 4) / (B * (B - 1) / 2)
    mean_cosine = -1 / (B - 1)  # the simplex
    return -mean_cosine if kind == "infonce_cosine" else 2 - 2 * mean_cosine
