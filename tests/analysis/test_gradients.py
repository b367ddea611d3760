"""Gradient ratio and cosine against a linear model, where both gradients are closed forms."""

import pytest
import torch
from torch import nn

from dispersive_kit.analysis import gradient_pull
from dispersive_kit.diffusion.objectives import FlowMatching
from dispersive_kit.regularizers import LossOptions
from dispersive_kit.training.draws import DeviceSet


class Linear(nn.Module):
    """v = W2 W1 x, tapped after each product."""

    null_label = None

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2)).double()
        for block in self.blocks:
            block.weight.data.normal_(0, 0.2, generator=generator)

    def forward(self, x, t, y=None, taps=()):
        first = self.blocks[0](x.flatten(1).double())
        second = self.blocks[1](first)
        return second.view_as(x), [first, second]


def closed_forms(model, batch, tau):
    """(dispersive, denoising) gradients at both taps: facts of the l2 form, and of a mean square."""
    x_t = FlowMatching().path.x_t(batch.x0, batch.draws.eps, batch.draws.t).flatten(1).double()
    w1, w2 = (block.weight.detach() for block in model.blocks)
    features = x_t @ w1.T, x_t @ w1.T @ w2.T
    target = (batch.draws.eps - batch.x0).flatten(1).double()
    at_end = 2 * (features[1] - target) / target.numel()
    denoise = at_end @ w2, at_end
    spread = []
    for z in features:
        p = torch.softmax(-torch.cdist(z, z).square().flatten() / 64 / tau, 0).view(len(z), -1)
        spread.append(-4 / (tau * 64) * (p.sum(1, keepdim=True) * z - p @ z))
    return spread, denoise


def test_ratio_and_cosine_are_those_of_the_closed_forms(digits):
    model, tau, bins = Linear(), 0.7, 2
    pull = gradient_pull(model, digits, weight=0.3, options=LossOptions("infonce_l2", tau), bins=bins, batches=1)
    batch = DeviceSet.of(digits, "cpu").batch(FlowMatching(), seed=0, step=0, size=64, null_label=None, drop_prob=0.1)
    part = (batch.draws.t * bins).long()
    for b, (d, g) in enumerate(zip(*closed_forms(model, batch, tau), strict=True)):
        for k in range(bins):
            dk, gk = 0.3 * d[part == k].flatten(), g[part == k].flatten()
            assert float(pull.ratio[k, b]) == pytest.approx(float(dk.norm() / gk.norm()), rel=1e-5)
            assert float(pull.cosine[k, b]) == pytest.approx(float(dk @ gk / dk.norm() / gk.norm()), abs=1e-6)
        x = batch_input(model, batch, b)
        dw, gw = (d.T @ x).flatten(), (g.T @ x).flatten()
        assert float(pull.weights_cosine[b]) == pytest.approx(float(dw @ gw / dw.norm() / gw.norm()), abs=1e-6)


def batch_input(model, batch, b):
    x = FlowMatching().path.x_t(batch.x0, batch.draws.eps, batch.draws.t).flatten(1).double()
    return x if b == 0 else model.blocks[0](x).detach()


def test_the_weight_scales_the_ratio_and_turns_nothing(network, digits):
    one, two = (gradient_pull(network, digits, weight=w, batches=2) for w in (0.1, 0.2))
    assert torch.allclose(two.ratio, 2 * one.ratio, rtol=1e-4)
    assert torch.allclose(two.cosine, one.cosine, atol=1e-6)
    assert one.ratio.shape == (4, 3)


def test_a_saturated_loss_does_not_pull(network, digits):
    cold = gradient_pull(network, digits, options=LossOptions("infonce_l2", 1e-4), batches=1)
    assert float(cold.ratio.max()) < 1e-6
