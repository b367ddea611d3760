"""What a training measures of itself, beside its loss."""

from functools import partial

import torch
from torch import Tensor, nn

from dispersive_kit.diffusion.objectives import Objective
from dispersive_kit.training.draws import Batch


class GradientRatio:
    """|d dispersive / dz| over |d loss / dz| at the tapped activations z: how hard the regulariser pulls.

    The backward pass of the training goes through z anyway, where a hook sees the gradient of all that is trained on;
    that of `dispersive` alone is short, and taken before. So measuring costs no second pass through the network.
    `dispersive` is weighted, as it enters the total; with a weight of zero, now or by its schedule, it is a constant.
    """

    def __init__(self, dispersive: Tensor, taps: list[Tensor], *, added: bool) -> None:
        self.zero, self.added = torch.zeros_like(dispersive), added
        self.pull = torch.autograd.grad(dispersive, taps, retain_graph=True) if dispersive.requires_grad else ()
        self.total: dict[int, Tensor] = {}
        for i, z in enumerate(taps if self.pull else ()):
            z.register_hook(partial(self.total.__setitem__, i))

    def after_backward(self, share: float) -> Tensor:
        """The ratio (0-d), once `share` times the total was sent backward."""
        if not self.pull:
            return self.zero
        push = [self.total[i] / share - (pull if self.added else 0) for i, pull in enumerate(self.pull)]
        pull_norm, push_norm = (torch.stack([g.norm() for g in part]).norm() for part in (self.pull, push))
        return pull_norm / push_norm


def held_out_loss(model: nn.Module, objective: Objective, frozen: Batch, bins: int = 4) -> dict[str, Tensor]:
    """Denoising loss on the frozen held-out batch: the mean, and the mean within `bins` equal parts of t.

    A part of t that a small batch leaves empty is left out.
    """
    with torch.no_grad():
        _, aux = objective(model, frozen.x0, frozen.y, draws=frozen.draws)
    part = (aux.t * bins).long().clamp(max=bins - 1)
    by_bin = {f"held_out_t{i}": aux.per_sample[part == i].mean() for i in range(bins) if (part == i).any()}
    return {"held_out": aux.per_sample.mean(), **by_bin}
