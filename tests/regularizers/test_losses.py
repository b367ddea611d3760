"""The family: values, gradients and identities, against references written from the formulas in float64.

Each `mutation` names a change of the code that was tried and makes the test below it fail.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from dispersive_kit.errors import DispersiveError
from dispersive_kit.regularizers import KINDS, dispersive_loss
from dispersive_kit.regularizers import pairwise as engine
from dispersive_kit.regularizers.losses import distance

LOG_KINDS = [name for name, kind in KINDS.items() if kind.log]
SHIFT_INVARIANT = ["infonce_l2", "hinge", "covariance", "vicreg"]
F64 = torch.float64


def features(*shape, seed=0, dtype=F64, scale=1.0):
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * scale
    return z.to(dtype).requires_grad_()


def off_diagonal(B):
    return ~torch.eye(B, dtype=torch.bool)


def reference(z, kind, tau, diagonal):
    """L of float64 rows (B, dim), by differences of rows, nothing centred, no Gram product."""
    z = z.flatten(1)
    B, dim = z.shape
    if kind in ("covariance", "vicreg"):
        c = z - z.mean(0)
        cov = c.T @ c / (B - 1)
        if kind == "covariance":
            std = (cov.diagonal() + 1e-12).sqrt()
            total = (cov / std / std[:, None]).square()
            return (total if diagonal else total[off_diagonal(dim)]).sum() / dim**2
        std = (cov.diagonal() + 1e-4).sqrt()
        total = cov.square() if diagonal else cov.square()[off_diagonal(dim)]
        return (tau - std).clamp(min=0).mean() + total.sum() / (25 * dim)
    keep = torch.ones(B, B, dtype=torch.bool) if diagonal else off_diagonal(B)
    if kind in ("infonce_l2", "hinge"):
        D = (z[:, None] - z).square().sum(2) / dim
    else:
        u = z / z.norm(dim=1, keepdim=True)
        chord = (u[:, None] - u).square().sum(2)
        D = {
            "infonce_cosine": chord / 2 - 1,
            "sphere": chord,
            "angular": 2 / math.pi * (chord[keep] / 4).clamp(1e-30, 1).sqrt().asin(),
        }[kind]
    D = D if kind == "angular" else D[keep]
    if kind == "hinge":
        return (tau - D).clamp(min=0).square().mean()
    return torch.logsumexp(-D / tau, 0) - math.log(len(D))


def value_and_gradient(loss, z):
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach().double(), gradient.double()


@st.composite
def batches(draw):
    kind = draw(st.sampled_from(sorted(KINDS)))
    return {
        "shape": (draw(st.integers(3, 9)), draw(st.integers(2, 6)), *draw(st.lists(st.integers(1, 6), max_size=2))),
        "scale": 10 ** draw(st.floats(-3, 3)),
        "offset": draw(st.floats(0, 1e3)) if kind in SHIFT_INVARIANT else 0.0,
        "seed": draw(st.integers(0, 2**20)),
        "tau": None if kind == "covariance" else draw(st.sampled_from([0.1, 0.5, 1.0, 3.0])),
        "kind": kind,
        "diagonal": draw(st.booleans()),
    }


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@settings(max_examples=250, deadline=None)
@given(case=batches())
def test_equals_the_formula(case, dtype):
    # mutation: `slope` with -1 / tau; a factor of 2 in `pull`; no mean subtracted in float32
    options = {name: case[name] for name in ("kind", "tau", "diagonal")}
    z = features(*case["shape"], seed=case["seed"], scale=case["scale"]).detach() + case["offset"]
    z = z.to(dtype).requires_grad_()
    exact = z.detach().double().requires_grad_()
    tau = KINDS[case["kind"]].tau if case["tau"] is None else case["tau"]
    want, slope = value_and_gradient(reference(exact, case["kind"], tau, case["diagonal"]), exact)
    got, gradient = value_and_gradient(dispersive_loss(z, **options), z)
    assert abs(got - want) <= (1e-6 if dtype == torch.float32 else 1e-10) * max(1, abs(want))
    # A gradient below the smallest float32 is 0. In float64 rounding of D / tau itself, the exponent, shows.
    smallest = 1e-37 * z.numel() if dtype == torch.float32 else 1e-300
    exponent = exact.square().mean().item() / tau if KINDS[case["kind"]].log else 1.0
    steep = 1e-4 if dtype == torch.float32 else 1e-10 * max(1.0, 1e-4 * exponent)
    assert (gradient - slope).norm() <= steep * slope.norm() + smallest


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_passes_gradcheck(kind, diagonal):
    z = features(5, 2, 3)
    assert gradcheck(lambda z: dispersive_loss(z, kind=kind, diagonal=diagonal), (z,))


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "mean"},
        {"pool": "tokens"},
        {"normalize": "layer"},
        {"normalize": "unit"},
        {"norm_penalty": 0.3, "diagonal": False},
        {"tau": "auto", "kind": "sphere", "normalize": "layer", "pool": "mean"},
    ],
)
def test_options_pass_gradcheck(options):
    z = features(4, 3, 5, seed=1)
    if options.get("tau") == "auto":  # held constant: no gradient goes through the median
        u = F.normalize(F.layer_norm(z.detach(), (5,), eps=1e-6).mean(1), dim=1)
        options = {**options, "tau": (u[:, None] - u).square().sum(2)[off_diagonal(4)].median().item()}
    assert gradcheck(lambda z: dispersive_loss(z, **options), (z,))


@pytest.mark.parametrize(
    ("kind", "offset"), [*((kind, 0.0) for kind in KINDS), *((kind, 100.0) for kind in SHIFT_INVARIANT)]
)
def test_float32_products_are_accurate_for_large_features(kind, offset):
    # mutation: no mean subtracted
    z = (features(48, 16, 200).detach() + offset).float().requires_grad_()
    exact = z.detach().double().requires_grad_()
    assert engine.compute_dtype(z) == torch.float32
    tau = KINDS[kind].tau
    want, slope = value_and_gradient(reference(exact, kind, tau, KINDS[kind].diagonal), exact)
    got, gradient = value_and_gradient(dispersive_loss(z, kind=kind), z)
    assert abs(got - want) <= 1e-6 * max(1, abs(want))
    assert (gradient - slope).norm() <= 1e-4 * slope.norm()


def released(z, tau=0.5):
    z = z.flatten(1)
    d = F.pdist(z).square() / z.shape[1]
    return torch.exp(-torch.cat([d, d, d.new_zeros(len(z))]) / tau).mean().log()


def test_equals_the_released_form():
    z = features(16, 4, 8, scale=0.5)
    for ours, theirs in zip(value_and_gradient(dispersive_loss(z), z), value_and_gradient(released(z), z), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shape", [(32, 96), (64, 32, 512)])  # in float64 inside, and in float32
def test_gradient_where_the_released_form_has_none(shape):
    # mutation: exp before the sum, as in the released code
    z = features(*shape, dtype=torch.float32, scale=10.0)
    assert torch.autograd.grad(released(z), z)[0].abs().max() == 0
    (gradient,) = torch.autograd.grad(dispersive_loss(z, diagonal=False), z)
    assert gradient.isfinite().all() and gradient.norm() > 1e-4


def test_gradient_fades_with_scale_as_documented():
    size = {}
    for scale in (1.0, 2.0, 3.0, 6.0, 10.0):
        z = features(32, 98_304, dtype=torch.float32, scale=scale)
        size[scale] = torch.autograd.grad(dispersive_loss(z, tau=1.0), z)[0].norm().item()
    assert size[1.0] == pytest.approx(1.9e-3, rel=0.1)
    assert size[2.0] == pytest.approx(4.7e-5, rel=0.1)
    assert size[3.0] == pytest.approx(3e-9, rel=0.5)
    assert size[6.0] < 1e-29 and size[10.0] == 0
    z = features(32, 98_304, dtype=torch.float32, scale=3.0)
    free = torch.autograd.grad(dispersive_loss(z, tau=1.0, diagonal=False), z)[0].norm().item()
    assert free == pytest.approx(7e-3, rel=0.2)


def test_tokens_are_axis_one_of_sequences_and_pixels_of_maps():
    z = features(4, 3, 2, 2)  # (B, C, H, W)
    tokens = z.flatten(2).transpose(1, 2)  # (B, N, C)
    for pool in ("mean", "tokens"):
        torch.testing.assert_close(dispersive_loss(z, pool=pool), dispersive_loss(tokens, pool=pool))
    torch.testing.assert_close(dispersive_loss(z, pool="mean"), dispersive_loss(tokens.mean(1)))
    torch.testing.assert_close(dispersive_loss(z, pool="tokens"), dispersive_loss(tokens.flatten(0, 1)))


def test_layer_normalisation_is_per_token():
    z = features(4, 3, 5)
    want = dispersive_loss(F.layer_norm(z, (5,), eps=1e-6))
    torch.testing.assert_close(dispersive_loss(z, normalize="layer"), want)


@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if v.tau is not None and k != "vicreg"])
def test_auto_tau_is_the_median_distance(kind):
    z = features(9, 6)
    rows = F.normalize(z, dim=1) if KINDS[kind].unit else z
    D = distance(F.pdist(rows).square(), kind, 6).detach()
    auto = dispersive_loss(z, kind=kind, tau="auto")
    torch.testing.assert_close(auto, dispersive_loss(z, kind=kind, tau=D.median().item()))


def masked(z, keep, tau=0.5):
    D = (z[:, None] - z).square().sum(2) / z.shape[1]
    return torch.logsumexp(-D[keep] / tau, 0) - math.log(int(keep.sum()))


@pytest.mark.parametrize("diagonal", [True, False])
def test_pairs_of_one_class_or_far_in_time_do_not_count(diagonal):
    # mutation: `drop` not filled in; the count without `dropped`
    z = features(8, 5)
    y, t = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.linspace(0, 1, 8, dtype=F64)
    own = torch.eye(8, dtype=torch.bool)
    for options, keep in (
        ({"ignore_same_class": True, "y": y}, y[:, None] != y),
        ({"t_window": 0.3, "t": t}, ((t[:, None] - t).abs() <= 0.3) & ~own),
    ):
        got = dispersive_loss(z, diagonal=diagonal, **options)
        torch.testing.assert_close(got, masked(z, keep | own if diagonal else keep))


def test_no_pair_left_is_zero_with_zero_gradient():
    z = features(4, 3)
    for diagonal in (True, False):
        loss = dispersive_loss(z, ignore_same_class=True, y=torch.zeros(4, dtype=torch.long), diagonal=diagonal)
        value, gradient = value_and_gradient(loss, z)
        assert value == 0 and gradient.abs().max() < 1e-100


def test_norm_penalty_gives_the_l2_form_a_minimum():
    z = features(6, 4)
    grow = [dispersive_loss(s * z, diagonal=False, norm_penalty=1.0).item() for s in (0.1, 0.5, 1, 2, 8)]
    assert min(grow) not in (grow[0], grow[-1])
    free = [dispersive_loss(s * z, diagonal=False).item() for s in (0.1, 0.5, 1, 2, 8)]
    assert free == sorted(free, reverse=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "infonce-l2"}, "did you mean 'infonce_l2'"),
        ({"tau": 0.0}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"tau": "Auto"}, "tau"),
        ({"tau": "auto", "kind": "vicreg"}, "tau"),
        ({"tau": 0.5, "kind": "covariance"}, "leave out tau"),
        ({"pool": "max"}, "none, mean, tokens"),
        ({"normalize": "l2"}, "none, layer, unit"),
        ({"norm_penalty": -1.0}, "norm_penalty"),
        ({"norm_penalty": 1.0, "kind": "sphere"}, "norm_penalty"),
        ({"t_window": 0.0}, "t_window"),
        ({"t_window": 0.1}, "pass t="),
        ({"ignore_same_class": True}, "pass y="),
        ({"ignore_same_class": True, "kind": "vicreg"}, "leave out"),
        ({"diagonal": "no"}, "diagonal"),
        ({"y": torch.zeros(3)}, "y is"),
        ({"t": 0.5}, "t is"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(DispersiveError, match=words):
        dispersive_loss(features(4, 3), **options)


@pytest.mark.parametrize(
    "z",
    [
        torch.zeros(4),
        torch.zeros(()),
        torch.zeros(0, 3),
        torch.zeros(4, 0),
        torch.zeros(4, 3, dtype=torch.long),
        torch.zeros(4, 3, dtype=torch.complex64),
        torch.zeros(4, 3).to_sparse(),
        [[1.0, 2.0]],
        None,
    ],
)
def test_wrong_features_are_refused(z):
    with pytest.raises(DispersiveError, match="features"):
        dispersive_loss(z)


def test_a_batch_of_one_is_zero_or_refused():
    assert dispersive_loss(features(1, 3)).item() == 0
    with pytest.raises(DispersiveError, match="at least 2"):
        dispersive_loss(features(1, 3), kind="covariance")
