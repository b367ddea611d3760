"""The Dispersive Loss family as pure functions of a batch of features, its kinds, presets and options.

Wang & He, "Diffuse and Disperse", arXiv 2506.09027. No positive pairs, no parameters, no random numbers.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dispersive_kit.errors import DispersiveError
from dispersive_kit.regularizers.pairwise import Kernel, Pairs, PairSum, compute_dtype, full_precision

EPS = 1e-12


class _Kind(NamedTuple):
    tau: float | None  # default of the one scale; None: the kind has none
    diagonal: bool  # default
    unit: bool = False  # rows are put on the unit sphere
    log: bool = False  # a log-mean-exp of -D / tau, rather than a mean


KINDS = {
    "infonce_l2": _Kind(0.5, True, log=True),
    "infonce_cosine": _Kind(0.5, True, unit=True, log=True),
    "sphere": _Kind(0.5, False, unit=True, log=True),
    "angular": _Kind(0.5, False, unit=True, log=True),
    "hinge": _Kind(1.0, False),
    "covariance": _Kind(None, True),
    "vicreg": _Kind(1.0, False),
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"kind": "infonce_l2", "weight": 0.5, "tau": 0.5, "depth": 1 / 4},  # JAX, local batch 16
    "official-pytorch": {"kind": "infonce_l2", "weight": 0.25, "tau": 1.0, "depth": 1.0},  # local batch 32
    # For small models and short training runs. Study 3-why tuned eleven forms in the same way on 8 x 8 digits. This one
    # had the lowest mean Frechet distance: 0.96 times that of no loss, [0.90, 1.02], over nine seeds, which does not
    # show that it is better (`paper`: 5.1 times). With one learning rate for all arms it is equivalent to no loss at
    # weights of 0.003 and below, and worse from 0.03 on (study 3b-dose).
    "small": {"kind": "infonce_cosine", "weight": 0.01, "tau": 0.5, "pool": "mean", "depth": 1 / 4},
    # After CARE, arXiv 2609.28561, which weights the repulsion of a pair by the similarity of its conditions. Only its
    # abstract was available. Our reading: as `paper`, each pair weighted by the dissimilarity of its conditions. For
    # classes this is 0 within a class and 1 otherwise. An image whose label was dropped repels all others.
    "care": {"kind": "infonce_l2", "weight": 0.5, "tau": 0.5, "depth": 1 / 4, "ignore_same_class": True},
}
# The methods it is compared with in training (rivals.py); weights and depths are from a pilot study on digits.
# layersync: the block at `depth` is aligned with the block at twice the depth.
RIVALS: dict[str, dict[str, Any]] = {
    "repa": {"weight": 0.5, "depth": 1 / 2},
    "clean-patch": {"weight": 0.3, "depth": 1 / 2},
    "layersync": {"weight": 0.2, "depth": 1 / 4},
}


def preset_settings(name: str, overrides: Mapping[str, Any], presets: Mapping[str, Any] = PRESETS) -> dict[str, Any]:
    """`presets[name]` and `overrides`, checked. A changed kind uses its own default tau, unless tau is given."""
    check_choice("preset", name, tuple(presets))
    settings = dict(presets[name])
    if overrides.get("kind", settings.get("kind")) != settings.get("kind"):
        del settings["tau"]  # not comparable across kinds
    settings |= overrides
    LossOptions(**{field.name: settings[field.name] for field in fields(LossOptions) if field.name in settings})
    check_number("weight", settings["weight"], at_least=0.0)
    return settings


@dataclass(frozen=True)
class LossOptions:
    """Options of `dispersive_loss`. Raises DispersiveError: one is unknown, out of range, or contradicts another."""

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
        check_choice("diagonal", self.diagonal, (True, False, None))
        check_choice("pool", self.pool, ("none", "mean", "tokens"))
        check_choice("normalize", self.normalize, ("none", "layer", "unit", "batch"))
        check_choice("ignore_same_class", self.ignore_same_class, (True, False))
        check_number("norm_penalty", self.norm_penalty, at_least=0.0)
        if self.t_window is not None:
            check_number("t_window", self.t_window, above=0.0)
        if self.tau is not None and (self.tau != "auto" or self.kind == "vicreg"):
            check_number("tau", self.tau, above=0.0)
        kind, why = KINDS[self.kind], ""
        if kind.tau is None and self.tau is not None:
            why = f"has no scale: leave out tau (it was {self.tau!r})"
        elif self.of_channels and (self.t_window or self.ignore_same_class):
            why = "compares channels, not pairs of images: leave out t_window and ignore_same_class"
        elif self.norm_penalty and (kind.unit or self.normalize != "none"):
            why = "has normalised rows here, so the norm needs no penalty: leave out norm_penalty"
        if why:
            raise DispersiveError(f"kind {self.kind!r} {why}")

    @property
    def scale(self) -> float | str | None:
        return KINDS[self.kind].tau if self.tau is None else self.tau

    @property
    def of_channels(self) -> bool:
        """Whether channels are compared, and not images."""
        return self.kind in ("covariance", "vicreg")

    @property
    def with_diagonal(self) -> bool:
        return KINDS[self.kind].diagonal if self.diagonal is None else self.diagonal


def check_choice(what: str, value: Any, known: Sequence[Any]) -> None:
    if not any(value is one or (isinstance(value, str) and value == one) for one in known):
        near = difflib.get_close_matches(str(value), map(str, known), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DispersiveError(f"{what} {value!r} is unknown: {hint}choose from {', '.join(map(str, known))}")


def check_number(
    what: str, value: Any, above: float = -math.inf, at_least: float = -math.inf, *, whole: bool = False
) -> None:
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value <= above or value < at_least:
        bound = f"above {above:g}" if math.isfinite(above) else f"of at least {at_least:g}"
        raise DispersiveError(f"{what} is {value!r}: give a {'whole' if whole else 'finite'} number {bound}")


def dispersive_loss(
    z: Tensor,
    *,
    kind: str = "infonce_l2",
    tau: float | str | None = None,
    diagonal: bool | None = None,
    pool: str = "none",
    normalize: str = "none",
    norm_penalty: float = 0.0,
    t_window: float | None = None,
    ignore_same_class: bool = False,
    t: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """Dispersive Loss of features z (B, ...): a 0-d tensor to be minimised, float32 (float64 for float64 z).

    z_i (dim,) is row i, flattened or pooled; u_i = z_i / |z_i|; E is the mean over pairs i, j of the batch, with
    the diagonal i = j (D_ii = 0, no gradient) or without. Each line: formula; range; floor; gradient; source.

    infonce_l2      log E exp(-D / tau), D = |z_i - z_j|^2 / dim; (-inf, 0]; -log B with the diagonal, else none;
                    dL/dz_i = -(2 / (tau dim)) sum_j (p_ij + p_ji) (z_i - z_j), p = softmax of -D / tau over all
                    pairs: descent always increases sum_i |z_i|^2; zero at the floor; arXiv 2506.09027.
    infonce_cosine  log E exp(-D / tau), D = -cos(z_i, z_j); [-1 / tau, 1 / tau]; at the simplex,
                    cos = -1 / (B - 1); orthogonal to z_i, proportional to 1 / |z_i|; arXiv 2506.09027.
    sphere          log E exp(-|u_i - u_j|^2 / tau); [-4 / tau, 0]; simplex; orthogonal to z_i; the uniformity
                    of Wang & Isola, arXiv 2005.10242, t = 1 / tau. Equals infonce_cosine(tau / 2) - 2 / tau.
    angular         log E exp(-D / tau), D = angle(z_i, z_j) / pi; [-1 / tau, 0]; half the pairs opposite;
                    orthogonal to z_i, does not fade at small angles; after LM-Dispersion, arXiv 2602.00217.
    hinge           E max(0, tau - D)^2, D as infonce_l2; [0, tau^2]; 0 without the diagonal, tau^2 / B with;
                    zero beyond the margin tau. Our reading: the paper's margin is not known.
    covariance      sum_mn C_mn^2 / dim^2, C the correlation of channels over the batch; [1 / dim, 1];
                    1 / min(B - 1, dim), lower where channels are constant; blind to scale. 1 / L is the
                    participation ratio. Our reading: the paper's normalisation is not known, and without one,
                    collapse minimises the sum.
    vicreg          mean_m max(0, tau - std_m) + sum_{m != n} Cov_mn^2 / (25 dim); [0, inf); 0; the first term
                    stops collapse; VICReg's variance and covariance, 25 : 1, arXiv 2105.04906.

    tau: the one scale: temperature, margin (hinge) or target deviation (vicreg); "auto" is the median D of the
        pairs, held constant (1 - cos for infonce_cosine). None: the kind's own. Not comparable across kinds.
    diagonal: count i = j (m = n for covariance and vicreg). None: as published, True for infonce and covariance.
    pool: "none" flattens, "mean" averages tokens, "tokens" makes each a row. Tokens are axis 1 of (B, N, D),
        pixels of (B, C, H, W).
    normalize: "layer" each token over its channels, "unit" each row to RMS 1 (so D = |u_i - u_j|^2), "batch"
        all rows to RMS 1 together: the loss is then blind to the size of the features, and cannot make them grow.
    norm_penalty: adds norm_penalty * E |z_i|^2 / dim; the l2 form without diagonal has no minimum otherwise.
    t_window: only pairs with |t_i - t_j| <= t_window. ignore_same_class: only pairs with y_i != y_j.
    t, y: (B,), for these two options. If no pair i != j is left, only the diagonal counts; without it the loss is 0.

    Computed in float32 (float64 for float64 z and small batches), with or without autocast; differentiable once.
    In float32 D / tau has a relative error of about 1e-7: if it is above 300 without the diagonal, give z.double().
    Raises DispersiveError: shapes, types, options; a single row for covariance or vicreg.
    """
    options = LossOptions(kind, tau, diagonal, pool, normalize, norm_penalty, t_window, ignore_same_class)
    return measure(z, options, t=t, y=y).loss


class Measured(NamedTuple):
    """The loss (0-d, differentiable) and intermediate results; `mass` and `tau` are nan for a kind that has none."""

    loss: Tensor
    dropped: Tensor  # number of pairs i != j that do not count
    mass: Tensor  # share of the pairs i != j in the sum of exp(-D / tau)
    tau: Tensor
    gram: Tensor  # Gram matrix of the rows; of the first rows only, where there are many
    rows: int
    dim: int


@torch._disable_dynamo  # as torch.compiler.disable, but does not import Dynamo (2 s) before something is compiled
def measure(z: Tensor, options: LossOptions, *, t: Tensor | None = None, y: Tensor | None = None) -> Measured:
    """`dispersive_loss` with its intermediate results."""
    _check_features(z, t, y)
    with full_precision(z.device):
        x = _rows_of(z, options)  # (R, dim)
        tau = _temperature(x, options)
        measured = _of_channels(x, tau, options) if options.of_channels else _of_pairs(x, tau, options, t, y)
        loss = measured.loss
        if options.norm_penalty:
            loss = loss + options.norm_penalty * x.square().mean()
    return measured._replace(loss=loss.to(torch.float64 if z.dtype == torch.float64 else torch.float32))


def _check_features(z: Any, t: Any, y: Any) -> None:
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.layout != torch.strided:
        kind = f"{z.dtype} {z.layout} tensor" if isinstance(z, Tensor) else type(z).__name__
        raise DispersiveError(f"the features are a {kind}: give a dense tensor of floating point")
    if z.ndim < 2 or z.numel() == 0:
        raise DispersiveError(f"the features are {tuple(z.shape)}: give (B, ...) with no axis of size 0")
    for name, label in (("t", t), ("y", y)):
        if label is not None and (not isinstance(label, Tensor) or label.shape != z.shape[:1]):
            given = tuple(label.shape) if isinstance(label, Tensor) else f"a {type(label).__name__}"
            raise DispersiveError(
                f"{name} is {given} for features {tuple(z.shape)}: give a tensor ({len(z)},), or, if the first axis of "
                "the features is not the batch, transpose them with select="
            )


def _rows_of(z: Tensor, options: LossOptions) -> Tensor:
    """Rows (R, dim) whose pairs are compared: pooled, normalised, in the precision of the computation."""
    if options.pool != "none" or options.normalize == "layer":
        z = z.flatten(2).transpose(1, 2) if z.ndim > 3 else z.reshape(len(z), -1, z.shape[-1])  # (B, N, C)
    dtype = compute_dtype(z)
    if options.normalize == "layer":
        z = F.layer_norm(z.to(dtype), z.shape[-1:], eps=1e-6)
    if options.pool == "mean":
        z = z.mean(1, dtype=dtype)
    x = (z.flatten(0, 1) if options.pool == "tokens" else z.flatten(1)).to(dtype)
    if options.normalize == "unit":
        x = F.normalize(x, dim=1, eps=EPS) * math.sqrt(x.shape[1])
    if options.normalize == "batch":
        x = x * (x.square().mean() + EPS).rsqrt()
    return F.normalize(x, dim=1, eps=EPS) if KINDS[options.kind].unit else x


def _per_row(option: str, name: str, label: Tensor | None, x: Tensor) -> Tensor:
    if label is None:
        raise DispersiveError(f"{option} needs {name}: pass {name}= (B,)")
    if label.device.type == "cpu" and not label.isfinite().all():  # on a GPU the check would synchronise
        raise DispersiveError(f"{option} needs {name}, and it holds NaN or infinity: give finite numbers")
    if not label.is_floating_point():
        label = label.long()  # the difference of unsigned numbers wraps round
    return label.detach().to(x.device).repeat_interleave(len(x) // len(label))  # tokens may be rows


def _temperature(x: Tensor, options: LossOptions) -> Tensor:
    """tau (0-d), nan for a kind that has none; "auto" is the median D over the pairs of 512 rows, evenly taken."""
    if options.scale != "auto":
        scale = math.nan if options.scale is None else float(options.scale)
        return torch.full((), scale, dtype=x.dtype, device=x.device)
    rows = x.detach()[torch.arange(n := min(512, len(x)), device=x.device) * len(x) // n]
    rows = rows - rows.mean(0)
    gram = rows @ rows.T
    i, j = torch.triu_indices(len(rows), len(rows), 1, device=x.device)
    u = (gram.diagonal()[i] + gram.diagonal()[j] - 2 * gram[i, j]).clamp(min=0)
    return distance(u, options.kind, x.shape[1]).nanmedian().nan_to_num(1.0).clamp(min=EPS)


def distance(u: Tensor, kind: str, dim: int) -> Tensor:
    """D from u = |x_i - x_j|^2; for infonce_cosine 1 - cos, which is not negative."""
    if kind == "angular":
        return (u / 4).clamp(max=1).sqrt().asin() * (2 / math.pi)
    return u / {"infonce_cosine": 2, "sphere": 1}.get(kind, dim)


def _angular_slope(u: Tensor, tau: Tensor) -> Tensor:
    """d(-D / tau) / du; sin(angle / 2) is kept away from 0 and 1, where the angle has no derivative."""
    s = (u / 4).clamp(min=1e-12, max=1 - 1e-7).sqrt()
    return (s * (1 - s.square()).sqrt()).mul_(-4 * math.pi * tau).reciprocal_()


def _kernel_of(kind: str, tau: Tensor, dim: int) -> Kernel:
    if kind == "hinge":
        short = lambda u: (tau - u / dim).clamp(min=0)  # noqa: E731
        return Kernel(lambda u: short(u).square(), lambda u: short(u) * (-2 / dim), log=False)
    if kind == "angular":
        return Kernel(lambda u: distance(u, kind, dim) / -tau, lambda u: _angular_slope(u, tau))
    slope = distance(torch.ones_like(tau), kind, dim) / -tau
    shift = 1 / tau if kind == "infonce_cosine" else 0.0  # D = -cos = |u_i - u_j|^2 / 2 - 1
    return Kernel(lambda u: u * slope + shift, lambda u: slope.expand_as(u).clone())


def _of_pairs(x: Tensor, tau: Tensor, options: LossOptions, t: Tensor | None, y: Tensor | None) -> Measured:
    """The loss from the sum over the pairs i != j; the diagonal, where D is exactly 0, is added in closed form."""
    kernel, rows = _kernel_of(options.kind, tau, x.shape[1]), len(x)
    y = _per_row("ignore_same_class", "y", y, x) if options.ignore_same_class else None
    t = _per_row("t_window", "t", t, x) if options.t_window else None
    total, dropped, gram = PairSum.apply(x, kernel, Pairs(y, t, options.t_window or 0.0))
    own = rows if options.with_diagonal else 0
    count = (rows * (rows - 1) + own - dropped).to(tau.dtype)
    at_zero = kernel.value(torch.zeros_like(tau))
    if not kernel.log:
        loss, mass = (total + own * at_zero) / count.clamp(min=1), torch.full_like(tau, math.nan)
    else:
        mass = torch.ones_like(tau)
        if own:  # exp(L) = 1 / B + (1 - 1 / B) exp(L without the diagonal)
            diagonal = at_zero + math.log(own)
            mass = torch.sigmoid(total.detach() - diagonal)
            total = torch.logaddexp(total, diagonal)
        loss = torch.where(count > 0, total - count.clamp(min=1).log(), 0 * total)
    return Measured(loss, dropped, mass, tau, gram, rows, x.shape[1])


def _of_channels(x: Tensor, tau: Tensor, options: LossOptions) -> Measured:
    """The loss from sum_mn C_mn^2 = |X X^T|_F^2, rows scaled so that X^T X holds covariances or correlations."""
    (B, dim), of_correlations = x.shape, options.kind == "covariance"
    if B < 2:
        raise DispersiveError(f"kind {options.kind!r} needs a batch of at least 2")
    x = x - x.mean(0)
    x = (x - x.mean(0)) / math.sqrt(B - 1)  # twice, because a large mean is rounded
    variance = x.square().sum(0)
    if of_correlations:
        x = x / (variance + EPS).sqrt()
    total, dropped, gram = PairSum.apply(x, Kernel(torch.square, lambda g: 2 * g, log=False, inner=True), Pairs())
    if not options.with_diagonal:
        total = total - x.square().sum(0).square().sum()
    if of_correlations:
        loss = total / dim**2
    else:
        loss = (tau - (variance + 1e-4).sqrt()).clamp(min=0).mean() + total / (25 * dim)
    return Measured(loss, dropped, torch.full_like(tau, math.nan), tau, gram, B, dim)


def floor(
    kind: str, batch: int, tau: float | None = None, *, diagonal: bool | None = None, dim: int = 0, dropped: int = 0
) -> float:
    """Lower bound of the loss of `batch` rows, or -inf; `dispersive_loss` says for which features it is reached.

    dim: width of the rows, for covariance, if known. dropped: pairs i != j that do not count, of batch (batch - 1).
    Raises DispersiveError: no pair, tau "auto", or as `dispersive_loss`.
    """
    options = LossOptions(kind=kind, tau=tau, diagonal=diagonal)
    own = batch if options.with_diagonal else 0
    if batch + own < 2 or options.scale == "auto":
        raise DispersiveError(f"no floor for {batch} rows at tau={tau!r}: give at least 2 rows, and tau as a number")
    if kind == "covariance":
        trace = 0.0 if own else 1 / dim if dim else 1 / (batch - 1)
        return 1 / max(1, min(batch - 1, dim or batch)) - trace
    scale = float(options.scale or math.nan)
    share = own / max(1, batch * (batch - 1) - dropped + own)  # of the diagonal among the pairs that count
    if not KINDS[kind].log:
        return share * scale**2 if kind == "hinge" else 0.0
    near = (1 / scale if kind == "infonce_cosine" else 0.0) + math.log(share) if share else -math.inf
    bounded = kind != "infonce_l2" and share < 1
    far = math.log(1 - share) - _largest_mean(kind, 2 if dropped else batch) / scale if bounded else -math.inf
    top = max(near, far)
    return top + math.log1p(math.exp(-abs(near - far))) if top > -math.inf else top


def _largest_mean(kind: str, B: int) -> float:
    """Largest mean of D over the pairs i != j: by Jensen it bounds the log-mean-exp."""
    if kind == "angular":  # a random plane separates at most floor(B^2 / 4) of the B (B - 1) / 2 pairs
        return (B * B // 4) / (B * (B - 1) / 2)
    cosine = -1 / (B - 1)  # the simplex
    return -cosine if kind == "infonce_cosine" else 2 - 2 * cosine
