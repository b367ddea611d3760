"""The average of the weights over training: the model one samples from."""

import copy

import torch
from torch import nn

from dispersive_kit.training.parallel import local


class EMA:
    """A copy of the model whose parameters follow it slowly.

    With w the average and p the parameters, w <- d w + (1 - d) p, where d = min(decay, (1 + n) / (10 + n)) at the
    n-th update: without that ramp a short run would average in its own initialisation.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages, parameters = ([local(p) for p in m.parameters()] for m in (self.model, model))
        torch._foreach_lerp_(averages, parameters, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
