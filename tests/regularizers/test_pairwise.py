"""The engine under the pairwise kinds: blocks, precision, autograd. A `mutation` was tried and fails the test."""

import pytest
import torch

from dispersive_kit.regularizers import KINDS, dispersive_loss
from dispersive_kit.regularizers import pairwise as engine

F64 = torch.float64


def features(*shape, seed=0, dtype=F64, scale=1.0):
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * scale
    return z.to(dtype).requires_grad_()


def value_and_gradient(loss, z):
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach().double(), gradient.double()


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_rows_give_the_same(kind, monkeypatch):
    # mutation: `laplacian.diagonal(0)`; the second block's sum forgotten
    z = features(23, 7)
    y = torch.arange(23) % 5
    masks = {} if kind in ("covariance", "vicreg") else {"ignore_same_class": True, "y": y}
    whole = value_and_gradient(dispersive_loss(z, kind=kind, **masks), z)
    monkeypatch.setattr(engine, "WHOLE", 23 * 6)
    monkeypatch.setattr(engine, "BLOCK", 23 * 6)
    assert len(engine._split(23)) == 4
    for a, b in zip(value_and_gradient(dispersive_loss(z, kind=kind, **masks), z), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_computed_in_float32(dtype):
    z = features(32, 8, 600, dtype=dtype)
    want, slope = value_and_gradient(dispersive_loss(z.float()), z)
    got, gradient = value_and_gradient(dispersive_loss(z), z)
    assert abs(got - want) < 1e-7 and (gradient - slope).norm() <= 1e-2 * slope.norm()
    assert dispersive_loss(z).dtype == torch.float32


def test_autocast_changes_nothing():
    # mutation: `full_precision` without torch.autocast(enabled=False)
    z = features(48, 16, 200, dtype=torch.float32)
    want = value_and_gradient(dispersive_loss(z), z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradient(dispersive_loss(z), z)  # backward inside autocast too
    assert got[0] == want[0] and torch.equal(got[1], want[1])


def test_lowered_matmul_precision_changes_nothing():
    # mutation: `full_precision` without "ieee"
    z = features(48, 16, 200, dtype=torch.float32)
    want = value_and_gradient(dispersive_loss(z), z)
    torch.set_float32_matmul_precision("medium")
    try:
        got = value_and_gradient(dispersive_loss(z), z)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert got[0] == want[0] and torch.equal(got[1], want[1])


def test_no_random_number_is_drawn():
    state = torch.get_rng_state()
    for kind in KINDS:
        dispersive_loss(features(4, 5), kind=kind).backward()
    assert torch.equal(state, torch.get_rng_state())


def test_double_backward_is_refused_not_wrong():
    z = features(4, 5)
    (gradient,) = torch.autograd.grad(dispersive_loss(z), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_identical_rows_are_finite():
    z = torch.ones(5, 4, dtype=F64, requires_grad=True)
    for kind in KINDS:
        for diagonal in (True, False):
            loss, gradient = value_and_gradient(dispersive_loss(z, kind=kind, diagonal=diagonal), z)
            assert loss.isfinite() and gradient.isfinite().all()
