"""The methods that Dispersive Loss is compared with: a norm placebo, LayerSync, REPA, a head for clean patches."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispersive_kit.errors import DispersiveError
from dispersive_kit.regularizers.attach import Dispersive
from dispersive_kit.regularizers.losses import check_number
from dispersive_kit.regularizers.taps import At, Attached


class NormMatched(Dispersive):
    """weight * (log RMS(z) - log rms)^2: a placebo that sets the size of the features and does not spread them.

    With `rms` set to the value reached under Dispersive Loss, all effects of the size alone appear here too. Used
    like `Dispersive`; `stats` are those of Dispersive Loss with the same options, which is measured but not added.
    Raises DispersiveError: rms not above 0; otherwise as `Dispersive`.
    """

    def __init__(self, model: nn.Module, at: At = None, *, rms: float, **options: Any) -> None:
        check_number("rms", rms, above=0.0)
        super().__init__(model, at, **options)
        self.rms = rms

    def _one(self, path: str, z: Tensor, t: Tensor | None, y: Tensor | None, weight: float) -> Tensor:
        super()._one(path, z.detach(), t, y, weight)
        mean_square = z.to(torch.promote_types(z.dtype, torch.float32)).square().mean().clamp(min=1e-12)
        return (mean_square.log() / 2 - math.log(self.rms)).square()


class Rival(Attached):
    value: Tensor  # unweighted, of the last loss() in training

    def _loss(self, features: list[Tensor], weight: float, x0: Any, t: Any, y: Any, step: Any) -> Tensor:
        term = self._term(features, x0)
        self.value = term.detach()
        if term.device.type == "cpu" and not term.isfinite():  # on a GPU the check would synchronise
            raise DispersiveError(f"taps {self.where}: the loss is {float(self.value)}: lower the learning rate")
        return weight * term  # also at weight 0: DDP waits for a gradient of every parameter

    @abstractmethod
    def _term(self, features: list[Tensor], x0: Tensor | None) -> Tensor: ...


class LayerSync(Rival):
    """weight * -E cos(shallow token, deep token without gradient): an earlier block learns from a deeper one.

    arXiv 2510.12581. Used like `Dispersive`. options: weight, select, schedule.
    """

    def __init__(self, model: nn.Module, shallow: str | nn.Module, deep: str | nn.Module, **options: Any) -> None:
        super().__init__(model, [shallow, deep], **options)
        blocks = [f".{path}".rsplit(".", 1) for path in self.paths]
        order = [int(name) for of, name in blocks if name.isdigit() and of == blocks[0][0]]
        if len(blocks) != 2 or order != sorted(order):
            self.remove()
            raise DispersiveError(f"LayerSync: {self.where}: give a shallow module, which is taught, and a deeper one")

    def _term(self, features: list[Tensor], x0: Tensor | None) -> Tensor:
        shallow, deep = (z.flatten(2).mT if z.ndim > 3 else z for z in features)  # (B, N, C)
        return _compared(shallow, deep.detach(), self.paths[0])


class REPA(Rival):
    """weight * -E cos(projector(token), encoder's feature): alignment with a frozen encoder, arXiv 2410.06940.

    Used like `Dispersive`, with loss(x0=x0). encoder: any function of the clean images that returns (B, E), compared
    with the mean of the tokens, or (B, N, E), compared token by token. projector: from the block's width to E (in the
    paper three layers with SiLU); add its parameters to the optimizer. options: weight, depth, select, schedule.
    """

    squared = False

    def __init__(
        self, model: nn.Module, at: At = None, *, encoder: Callable[..., Tensor], projector: nn.Module, **options: Any
    ) -> None:
        super().__init__(model, at, **options)
        self.encoder, self.projector = encoder, projector

    def _term(self, features: list[Tensor], x0: Tensor | None) -> Tensor:
        if x0 is None:
            raise DispersiveError(f"{type(self).__name__} on {self.where} needs the clean images: call loss(x0=x0)")
        terms = []
        with torch.no_grad():
            target = self.encoder(x0)
        for path, z in zip(self.paths, features, strict=True):
            tokens = z.flatten(2).transpose(1, 2) if z.ndim > 3 else z  # (B, N, C)
            if not torch.is_autocast_enabled(tokens.device.type):  # under autocast the block returned bf16
                tokens = tokens.to(next((p.dtype for p in self.projector.parameters()), tokens.dtype))
            if target.ndim == 2 and tokens.ndim == 3:
                tokens = tokens.mean(1)
            terms.append(_compared(self.projector(tokens), target, path, squared=self.squared))
        return torch.stack(terms).mean()


class CleanPatch(REPA):
    """weight * E |projector(token) - its patch of the clean image|^2 / dim: the block learns to predict it.

    projector: a linear map from the block's width to the C p p values of a patch of side p = `patch_size`.
    """

    squared = True

    def __init__(self, model: nn.Module, at: At = None, *, patch_size: int, **options: Any) -> None:
        def patches(x0: Tensor) -> Tensor:
            return F.unfold(x0, patch_size, stride=patch_size).transpose(1, 2)  # (B, N, C p p)

        super().__init__(model, at, encoder=patches, **options)


def _compared(z: Tensor, target: Tensor, path: str, *, squared: bool = False) -> Tensor:
    """-E cos over the last axis, or the mean squared difference."""
    if z.shape != target.shape:
        what = f"tap {path!r}: features {tuple(z.shape)} are to be aligned with {tuple(target.shape)}"
        raise DispersiveError(f"{what}: choose projector, encoder or blocks so that the two shapes are equal")
    if squared:
        return F.mse_loss(z.float(), target.float())
    return -F.cosine_similarity(z.float(), target.float(), dim=-1).mean()
