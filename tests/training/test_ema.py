import torch
from torch import nn

from dispersive_kit.training.train import EMA


def test_the_average_is_the_recursion_written_out():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    ema = EMA(model, decay=0.9)
    expected = model.weight.detach().clone()
    for n in range(30):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, dtype=torch.float64))
        ema.update(model)
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * model.weight.detach()
    assert torch.allclose(ema.model.weight, expected, atol=1e-12)
    assert not ema.model.weight.requires_grad and not ema.model.training


def test_buffers_are_copied_not_averaged():
    model = nn.BatchNorm1d(2)
    ema = EMA(model)
    model.train()(torch.randn(8, 2) + 5)
    ema.update(model)
    assert torch.equal(ema.model.running_mean, model.running_mean)
