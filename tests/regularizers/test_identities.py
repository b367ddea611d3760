"""What Dispersive Loss is known to be: identities, and floors. A `mutation` was tried and fails the test."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dispersive_kit.regularizers import KINDS, PRESETS, dispersive_loss, floor
from dispersive_kit.regularizers.losses import EPS

LOG_KINDS = [name for name, kind in KINDS.items() if kind.log]
F64 = torch.float64


def features(*shape, seed=0, dtype=F64, scale=1.0):
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * scale
    return z.to(dtype).requires_grad_()


def value_and_gradient(loss, z):
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach().double(), gradient.double()


@pytest.mark.parametrize("kind", LOG_KINDS)
def test_diagonal_is_a_share_of_one_over_b(kind):
    z, B = features(7, 5), 7
    at_zero = math.exp(2.0) if kind == "infonce_cosine" else 1.0
    with_it, without = (dispersive_loss(z, kind=kind, diagonal=d).item() for d in (True, False))
    assert math.exp(with_it) == pytest.approx(at_zero / B + (1 - 1 / B) * math.exp(without), rel=1e-12)


def test_radial_derivative_is_minus_two_over_tau_times_mean_weighted_distance():
    z, tau = features(6, 10, scale=0.7), 0.5
    D = (z[:, None] - z).square().sum(2).detach() / 10
    p = torch.softmax(-D.flatten() / tau, 0).view_as(D)
    _, gradient = value_and_gradient(dispersive_loss(z, tau=tau), z)
    radial = (z * gradient).sum()
    torch.testing.assert_close(radial, -2 / tau * (p * D).sum(), rtol=1e-10, atol=0)
    assert radial < 0  # growing the norm always lowers the l2 form


def test_gradient_is_the_documented_one():
    z, tau, dim = features(5, 8), 0.5, 8
    D = (z[:, None] - z).square().sum(2).detach() / dim
    p = torch.softmax(-D.flatten() / tau, 0).view_as(D)
    want = -2 / (tau * dim) * ((p + p.T)[..., None] * (z[:, None] - z).detach()).sum(1)
    torch.testing.assert_close(value_and_gradient(dispersive_loss(z), z)[1], want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["infonce_cosine", "sphere", "angular"])
def test_kinds_on_the_sphere_are_blind_to_scale(kind):
    z = features(6, 9)
    _, gradient = value_and_gradient(dispersive_loss(z, kind=kind), z)
    assert (z * gradient).sum(1).abs().max() < 1e-14
    assert dispersive_loss(8 * z, kind=kind).item() == pytest.approx(dispersive_loss(z, kind=kind).item(), rel=1e-12)


def test_sphere_is_wang_and_isola_uniformity():
    z, t = features(8, 5), 2.0
    uniformity = F.pdist(F.normalize(z, dim=1)).square().mul(-t).exp().mean().log()
    torch.testing.assert_close(dispersive_loss(z, kind="sphere", tau=1 / t), uniformity, rtol=1e-12, atol=0)


@pytest.mark.parametrize("diagonal", [True, False])
def test_sphere_is_cosine_of_half_tau_shifted(diagonal):
    z, tau = features(8, 5), 0.7
    cosine = dispersive_loss(z, kind="infonce_cosine", tau=tau / 2, diagonal=diagonal) - 2 / tau
    torch.testing.assert_close(dispersive_loss(z, kind="sphere", tau=tau, diagonal=diagonal), cosine)


def test_unit_normalised_l2_is_the_sphere():
    z = features(8, 5)
    unit = dispersive_loss(z, normalize="unit", diagonal=False)
    torch.testing.assert_close(unit, dispersive_loss(z, kind="sphere"), rtol=1e-12, atol=0)


def test_dim_and_the_sphere_do_not_mix():
    z = features(16, 196_608, dtype=torch.float32)
    u = F.normalize(z.detach(), dim=1).requires_grad_()
    divided = torch.autograd.grad(dispersive_loss(u), u)[0].norm()
    whole = torch.autograd.grad(dispersive_loss(u, tau=0.5 / 196_608), u)[0].norm()
    assert divided < 2e-5 and whole == pytest.approx(0.445, rel=0.05)


def test_log_outside_is_at_least_simclr():
    z = features(9, 6)
    D = (z[:, None] - z).square().sum(2) / 6
    assert (torch.logsumexp(-D / 0.5, 1) - math.log(9)).mean() <= dispersive_loss(z)


def test_exp_of_the_loss_is_the_squared_norm_of_the_mean_kernel_embedding():
    # 1-d, by quadrature of the Parzen density with variance tau * dim / 4, whose overlap is the kernel.
    z, tau = features(6, 1), 0.5
    grid = torch.linspace(-12, 12, 20_001, dtype=F64)
    variance = tau / 4
    density = torch.exp(-((grid - z.detach()) ** 2) / (2 * variance)).mean(0) / math.sqrt(2 * math.pi * variance)
    entropy = -torch.trapezoid(density**2, grid).log()
    assert entropy.item() == pytest.approx(-dispersive_loss(z).item() + 0.5 * math.log(math.pi * tau), rel=1e-9)


def test_on_the_sphere_it_is_the_mmd_to_the_uniform_law_up_to_a_constant():
    # On the circle, by quadrature: the cross term E_v k(u, v) is the same for every u.
    grid = torch.arange(20_000, dtype=F64) * (2 * math.pi / 20_000)
    circle = torch.stack([grid.cos(), grid.sin()], 1)
    constants = []
    for seed in range(3):
        u = F.normalize(features(6, 2, seed=seed).detach(), dim=1)
        cross = torch.exp(-2 * torch.cdist(u, circle).square()).mean()
        own = torch.exp(-2 * torch.cdist(u, u).square()).mean()
        uniform = torch.exp(-2 * (circle[0] - circle).square().sum(1)).mean()
        mmd = own - 2 * cross + uniform
        constants.append((dispersive_loss(u, kind="sphere", tau=0.5, diagonal=True).exp() - mmd).item())
    assert max(constants) - min(constants) < 1e-12


def test_covariance_is_one_over_the_participation_ratio():
    z = features(40, 6)
    eigenvalues = torch.linalg.eigvalsh(torch.corrcoef(z.detach().T))
    ratio = eigenvalues.sum() ** 2 / eigenvalues.square().sum()
    assert dispersive_loss(z, kind="covariance").item() == pytest.approx(1 / ratio.item(), rel=1e-9)


def test_off_diagonal_of_the_correlation_is_bounded_by_the_batch():
    z, B, dim = features(5, 20), 5, 20
    off = dispersive_loss(z, kind="covariance", diagonal=False).item() * dim**2
    assert off >= dim**2 / (B - 1) - dim


def test_covariance_is_not_lowered_by_collapse_and_vicreg_punishes_it():
    # mutation: covariance without `x / std`; vicreg without `spread`
    z = features(20, 8)
    small = (z.detach() * 0.1).requires_grad_()
    values = {k: (dispersive_loss(z, kind=k).item(), dispersive_loss(small, kind=k).item()) for k in KINDS}
    assert values["covariance"][0] == pytest.approx(values["covariance"][1], rel=1e-6)
    assert values["vicreg"][1] > values["vicreg"][0]
    c = z.detach() - z.detach().mean(0)
    raw = (c.T @ c / 19).square().sum()
    assert ((0.1 * c).T @ (0.1 * c) / 19).square().sum() / raw == pytest.approx(1e-4, rel=1e-9)


def test_scale_reference_of_unit_features():
    z = features(16, 65_536, dtype=torch.float32)
    assert dispersive_loss(z).item() == pytest.approx(-2.530, abs=0.01)
    z = features(32, 65_536, dtype=torch.float32)
    assert dispersive_loss(z, tau=1.0).item() == pytest.approx(-1.818, abs=0.01)


@pytest.mark.parametrize(("B", "value"), [(16, -2.7726), (32, -3.4657), (128, -4.8520), (1, 0.0)])
def test_floor_of_the_l2_form_is_minus_log_b(B, value):
    assert floor("infonce_l2", B) == pytest.approx(value, abs=5e-5)
    far = torch.eye(B, B + 1, dtype=F64) * 1e4
    assert dispersive_loss(far).item() == pytest.approx(value, abs=5e-5)


def simplex(B):
    return torch.eye(B, dtype=F64) - 1 / B


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("kind", ["infonce_cosine", "sphere"])
def test_floor_on_the_sphere_is_reached_by_the_simplex(kind, diagonal):
    reached = dispersive_loss(simplex(6), kind=kind, diagonal=diagonal).item()
    assert reached == pytest.approx(floor(kind, 6, diagonal=diagonal), rel=1e-12)
    assert dispersive_loss(features(6, 6), kind=kind, diagonal=diagonal) > reached


def test_floor_of_the_cosine_form_at_batch_128():
    assert floor("infonce_cosine", 128) == pytest.approx(0.034, abs=5e-4)


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


def test_antipodal_clusters_do_not_pass_the_angular_floor():
    z = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]], dtype=F64)
    for tau in (0.1, 1.0, 100.0):
        assert dispersive_loss(z, kind="angular", tau=tau).item() >= floor("angular", 4, tau) - 1e-12


def test_floor_survives_tiny_temperatures():
    assert floor("infonce_cosine", 8, 1e-4) == pytest.approx(1e4 - math.log(8))


def test_presets_are_the_published_ones():
    assert {k: PRESETS["paper"][k] for k in ("weight", "tau", "depth")} == {"weight": 0.5, "tau": 0.5, "depth": 0.25}
    official = PRESETS["official-pytorch"]
    assert (official["weight"], official["tau"], official["depth"]) == (0.25, 1.0, 1.0)
