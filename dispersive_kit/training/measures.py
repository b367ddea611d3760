"""What a training measures of itself, beside its loss."""

import torch
from torch import Tensor, nn

from dispersive_kit.diffusion.objectives import Objective
from dispersive_kit.training.draws import Batch


def gradient_ratio(dispersive: Tensor, loss: Tensor, taps: list[Tensor]) -> Tensor:
    """|d dispersive / dz| over |d loss / dz| at the tapped activations: how hard the regulariser pulls.

    `dispersive` is weighted, as it enters the total; with a weight of zero, now or by its schedule, it is a constant.
    """
    if not dispersive.requires_grad:
        return torch.zeros_like(loss)
    pull, push = (
        torch.stack([g.norm() for g in torch.autograd.grad(value, taps, retain_graph=True)]).norm()
        for value in (dispersive, loss)
    )
    return pull / push


def held_out_loss(model: nn.Module, objective: Objective, frozen: Batch, bins: int = 4) -> dict[str, Tensor]:
    """Denoising loss on the frozen held-out batch: the mean, and the mean within `bins` equal parts of t.

    A part of t that a small batch leaves empty is left out.
    """
    with torch.no_grad():
        _, aux = objective(model, frozen.x0, frozen.y, draws=frozen.draws)
    part = (aux.t * bins).long().clamp(max=bins - 1)
    by_bin = {f"held_out_t{i}": aux.per_sample[part == i].mean() for i in range(bins) if (part == i).any()}
    return {"held_out": aux.per_sample.mean(), **by_bin}
