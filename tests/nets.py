"""Small networks, features and one step of training, for the tests of several rooms."""

import torch
from torch import nn

from dispersive_kit.models import build_dit

X = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.linspace(0.1, 0.9, 6)


def randomised(model, seed=0, std=0.05):
    """With weights that make every path count: the published initialisation makes every block the identity."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=std, generator=generator)
    return model


def small_dit(**options):
    """Two blocks, for X and T."""
    return randomised(
        build_dit("DiT-T/4", **{"input_size": 8, "depth": 2, "num_classes": 0, **options}), seed=1
    ).train()


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def seen(reg, *inputs):
    """Output of the regulariser's model, while it is armed."""
    with reg:
        return reg.model(*(inputs or (X, T)))


def backward(model, out, loss):
    (out.square().mean() + loss).backward()
    return loss.detach(), gradient(model)


def step(model, reg, call=None, **labels):
    """Loss and gradient of one step with the regulariser; `call` is the model as it is called."""
    model.zero_grad()
    with reg:
        out = (model if call is None else call)(X, T)
    return backward(model, out, reg.loss(**labels))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (normal(*shape, seed=seed) * scale).to(dtype).requires_grad_()


def value_and_gradient(loss, z):
    (slope,) = torch.autograd.grad(loss, z)
    return loss.detach().double(), slope.double()
