"""What Dispersive Loss is known to be: identities, and floors."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nets import features, value_and_gradient

from dispersive_kit.regularizers import KINDS, dispersive_loss, floor
from dispersive_kit.regularizers.losses import EPS

F64 = torch.float64


def test_gradient_pushes_norms_up():
    z, tau = features(5, 8, scale=0.7), 0.5
    D = (z[:, None] - z).square().sum(2).detach() / 8
    p = torch.softmax(-D.flatten() / tau, 0).view_as(D)
    _, gradient = value_and_gradient(dispersive_loss(z), z)
    torch.testing.assert_close((z * gradient).sum(), -2 / tau * (p * D).sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", ["infonce_cosine", "sphere", "angular"])
def test_kinds_on_the_sphere_are_blind_to_scale(kind):
    z = features(6, 9)
    _, gradient = value_and_gradient(dispersive_loss(z, kind=kind), z)
    assert (z * gradient).sum(1).abs().max() < 1e-14
    assert dispersive_loss(8 * z, kind=kind).item() == pytest.approx(dispersive_loss(z, kind=kind).item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["infonce_l2", "hinge", "vicreg"])
def test_normalised_by_the_rms_of_the_batch_it_cannot_make_features_grow(kind):
    z = features(6, 9, scale=3.0)
    loss = dispersive_loss(z, kind=kind, normalize="batch")
    torch.testing.assert_close(loss, dispersive_loss(z / z.square().mean().sqrt(), kind=kind))
    lengths = (z * value_and_gradient(loss, z)[1]).sum(1)
    assert abs(lengths.sum()) < 1e-12
    assert lengths.abs().max() > 1e-4  # the rows are not put on a sphere: one may grow against the others


@pytest.mark.parametrize("diagonal", [True, False])
def test_sphere_is_cosine_of_half_tau_shifted_and_l2_of_unit_rows(diagonal):
    z, tau = features(8, 5), 0.7
    sphere = dispersive_loss(z, kind="sphere", tau=tau, diagonal=diagonal)
    cosine = dispersive_loss(z, kind="infonce_cosine", tau=tau / 2, diagonal=diagonal) - 2 / tau
    torch.testing.assert_close(sphere, cosine)
    torch.testing.assert_close(sphere, dispersive_loss(z, normalize="unit", tau=tau, diagonal=diagonal))


def test_covariance_is_one_over_the_participation_ratio():
    z = features(40, 6)
    eigenvalues = torch.linalg.eigvalsh(torch.corrcoef(z.detach().T))
    ratio = eigenvalues.sum() ** 2 / eigenvalues.square().sum()
    assert dispersive_loss(z, kind="covariance").item() == pytest.approx(1 / ratio.item(), rel=1e-9)


def test_covariance_is_not_lowered_by_collapse_and_vicreg_punishes_it():
    z = features(20, 8)
    at = {kind: [dispersive_loss(s * z, kind=kind).item() for s in (1.0, 0.1)] for kind in ("covariance", "vicreg")}
    assert at["covariance"][0] == pytest.approx(at["covariance"][1], rel=1e-6)
    assert at["vicreg"][1] > at["vicreg"][0]


@pytest.mark.parametrize(("B", "value"), [(16, -2.7726), (32, -3.4657), (128, -4.8520), (1, 0.0)])
def test_floor_of_the_l2_form_is_minus_log_b(B, value):
    assert floor("infonce_l2", B) == pytest.approx(value, abs=5e-5)
    far = torch.eye(B, B + 1, dtype=F64) * 1e4
    assert dispersive_loss(far).item() == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("kind", ["infonce_cosine", "sphere"])
def test_floor_on_the_sphere_is_reached_by_the_simplex(kind, diagonal):
    simplex = torch.eye(6, dtype=F64) - 1 / 6
    reached = dispersive_loss(simplex, kind=kind, diagonal=diagonal).item()
    assert reached == pytest.approx(floor(kind, 6, diagonal=diagonal), rel=1e-12)
    assert dispersive_loss(features(6, 6), kind=kind, diagonal=diagonal) > reached


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**20), B=st.integers(2, 8), dim=st.integers(2, 12))
@example(seed=2, B=2, dim=11)  # a channel whose two values all but agree
@settings(max_examples=25, deadline=None)
def test_no_batch_is_below_the_floor(kind, diagonal, seed, B, dim):
    z = features(B, dim, seed=seed)
    low = floor(kind, B, diagonal=diagonal, dim=dim)
    smallest = float(z.detach().var(0, correction=0).min())  # a correlation falls short by EPS beside the variance
    slack = 2 * EPS / smallest if kind == "covariance" else 0.0
    assert dispersive_loss(z, kind=kind, diagonal=diagonal).item() >= low - slack - 1e-6


@pytest.mark.parametrize("tau", [0.1, 1.0, 100.0])
def test_antipodal_clusters_do_not_pass_the_angular_floor(tau):
    z = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]], dtype=F64)
    assert dispersive_loss(z, kind="angular", tau=tau).item() >= floor("angular", 4, tau) - 1e-12


def test_floor_of_the_cosine_form_at_batch_128_and_at_a_tiny_temperature():
    assert floor("infonce_cosine", 128) == pytest.approx(0.034, abs=5e-4)
    assert floor("infonce_cosine", 8, 1e-4) == pytest.approx(1e4 - math.log(8))
