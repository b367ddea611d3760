"""What Dispersive Loss is compared with: its contrastive counterparts, a placebo of norms, LayerSync, REPA."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispersive_kit.errors import DispersiveError
from dispersive_kit.regularizers import losses
from dispersive_kit.regularizers.attach import Dispersive
from dispersive_kit.regularizers.losses import LossOptions, check_number, dispersive_loss
from dispersive_kit.regularizers.pairwise import full_precision
from dispersive_kit.regularizers.taps import At, Attached


def contrastive_loss(z: Tensor, positive: Tensor, *, alpha: float = 1.0, **options: Any) -> Tensor:
    """alpha * (term of the positive pairs) + `dispersive_loss(z, **options)`; 0-d. z, positive (B, ...).

    The term is E_i D(z_i, z+_i) / tau for the InfoNCE kinds, E_i D^2 for hinge, mean_m (1 - C_mm)^2 with C
    the correlation between the views for covariance (Barlow Twins, arXiv 2103.03230), and E_i |z_i - z+_i|^2
    / dim for vicreg. alpha = 0 is Dispersive Loss, alpha = 1 the contrastive counterpart.

    Raises:
        DispersiveError: alpha outside [0, 1], views of different shape, or as `dispersive_loss`.
    """
    check_number("alpha", alpha, at_least=0.0)
    if alpha > 1 or positive.shape != z.shape:
        what = f"alpha {alpha} and a second view {tuple(positive.shape)} beside {tuple(z.shape)}"
        raise DispersiveError(f"{what}: give alpha in [0, 1] and views of one shape")
    loss = dispersive_loss(z, **options)
    pull = {k: v for k, v in options.items() if k not in ("t", "y")}
    with full_precision(z.device):
        return loss + alpha * _positive_term(z, positive, LossOptions.of(pull)).to(loss.dtype)


def _positive_term(z: Tensor, positive: Tensor, options: LossOptions) -> Tensor:
    a, b = losses.rows_of(z, options), losses.rows_of(positive, options)  # (R, dim)
    u = (a - b).square().sum(1).clamp(min=1e-12)  # (R,)
    if options.kind == "covariance":
        a, b = ((v - v.mean(0)) / (v.var(0, correction=0) + 1e-12).sqrt() for v in (a, b))
        return (1 - (a * b).mean(0)).square().mean()
    D = losses.distance(u, options.kind, a.shape[1]) - float(options.kind == "infonce_cosine")  # -cos
    if options.kind == "vicreg":
        return D.mean()
    return D.square().mean() if options.kind == "hinge" else D.mean() / losses.temperature(a, options)


class NormMatched(Dispersive):
    """weight * (log RMS(z) - log rms)^2: a placebo that gives the features a size, and spreads nothing.

    Set `rms` to what features reach under Dispersive Loss, and all that follows from their size alone follows here
    too. Used as `Dispersive` is; `stats` are those of Dispersive Loss with the same options, which is not added.

    Raises:
        DispersiveError: rms not above 0; else as `Dispersive`.
    """

    def __init__(self, model: nn.Module, at: At = None, *, rms: float, **options: Any) -> None:
        check_number("rms", rms, above=0.0)
        super().__init__(model, at, **options)
        self.rms = rms

    def _one(self, path: str, z: Tensor, t: Tensor | None, y: Tensor | None, weight: float) -> Tensor:
        super()._one(path, z.detach(), t, y, weight)
        mean_square = z.to(torch.promote_types(z.dtype, torch.float32)).square().mean().clamp(min=1e-12)
        return (mean_square.log() / 2 - math.log(self.rms)).square()


class LayerSync(Attached):
    """weight * -E cos(shallow token, deep token without gradient): a deeper block teaches an earlier one.

    Used as `Dispersive` is: `with sync: ...`, then `sync.loss(step=step)`. options: weight, select, schedule.
    """

    def __init__(self, model: nn.Module, shallow: str | nn.Module, deep: str | nn.Module, **options: Any) -> None:
        super().__init__(model, [shallow, deep], **options)
        blocks = [f".{path}".rsplit(".", 1) for path in self.paths]
        order = [int(name) for of, name in blocks if name.isdigit() and of == blocks[0][0]]
        if len(blocks) != 2 or order != sorted(order):
            self.remove()
            raise DispersiveError(
                f"LayerSync of {self.where}: give a shallow module, which is taught, and a deeper one"
            )

    def loss(self, *, step: int | None = None, taps: list[Tensor] | None = None) -> Tensor:
        """Weighted loss (0-d), zero in eval.

        Raises:
            DispersiveError: as `Dispersive.loss`; unequal shapes.
        """
        if not self._active():
            return self._zero()
        shallow, deep = self._take(taps)
        return self._weight(step) * _alignment(shallow, deep.detach(), self.paths[0])


class REPA(Attached):
    """weight * -E cos(projector(token), encoder's feature): alignment with a frozen encoder, arXiv 2410.06940.

    encoder: any callable of the clean images, giving (B, E), aligned with the mean of the tokens, or (B, N, E),
    token by token. projector: an nn.Module from the block's width to E (the paper's: three layers with SiLU), whose
    parameters belong into the optimizer. options: weight, depth, select, schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        at: At = None,
        *,
        encoder: Callable[[Tensor], Tensor],
        projector: nn.Module,
        **options: Any,
    ) -> None:
        super().__init__(model, at, **options)
        self.encoder, self.projector = encoder, projector

    def loss(self, x0: Tensor, *, step: int | None = None, taps: list[Tensor] | None = None) -> Tensor:
        """Weighted loss (0-d) for the clean images x0 (B, ...) of the batch, zero in eval.

        Raises:
            DispersiveError: as `Dispersive.loss`; features of another shape than the projected tokens.
        """
        if not self._active():
            return self._zero()
        terms = []
        with torch.no_grad():
            target = self.encoder(x0)
        for path, z in zip(self.paths, self._take(taps), strict=True):
            tokens = z.flatten(2).transpose(1, 2) if z.ndim > 3 else z  # (B, N, C)
            if not torch.is_autocast_enabled(tokens.device.type):  # a block under autocast gives bf16, also outside it
                tokens = tokens.to(next((p.dtype for p in self.projector.parameters()), tokens.dtype))
            if target.ndim == 2 and tokens.ndim == 3:
                tokens = tokens.mean(1)
            terms.append(_alignment(self.projector(tokens), target.detach(), path))
        return self._weight(step) * torch.stack(terms).mean()


def _alignment(z: Tensor, target: Tensor, path: str) -> Tensor:
    """-E cos over the last axis."""
    if z.shape != target.shape:
        what = f"tap {path!r}: features {tuple(z.shape)} are to be aligned with {tuple(target.shape)}"
        raise DispersiveError(f"{what}: choose projector, encoder or blocks so that the two shapes are equal")
    return -F.cosine_similarity(z.float(), target.float(), dim=-1).mean()
