"""The family: values and gradients, against references written from the formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import features, value_and_gradient
from torch.autograd import gradcheck

from dispersive_kit.errors import DispersiveError
from dispersive_kit.regularizers import KINDS, dispersive_loss
from dispersive_kit.regularizers import pairwise as engine
from dispersive_kit.regularizers.losses import distance

SHIFT_INVARIANT = ["infonce_l2", "hinge", "covariance", "vicreg"]
F64 = torch.float64


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


def judged(z, options):
    """Value and gradient of z (B, ...) in its precision, and those of the formula at the same numbers in float64."""
    kind = KINDS[options["kind"]]
    tau = kind.tau if options.get("tau") is None else options["tau"]
    exact, z = z.detach().double().requires_grad_(), z.detach().requires_grad_()
    formula = reference(exact, options["kind"], tau, options.get("diagonal", kind.diagonal))
    return *value_and_gradient(dispersive_loss(z, **options), z), *value_and_gradient(formula, exact)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@settings(max_examples=120, deadline=None)
@given(case=batches())
def test_equals_the_formula(case, dtype):
    options = {name: case[name] for name in ("kind", "tau", "diagonal")}
    z = (features(*case["shape"], seed=case["seed"], scale=case["scale"]).detach() + case["offset"]).to(dtype)
    got, gradient, want, slope = judged(z, options)
    assert abs(got - want) <= (1e-6 if dtype == torch.float32 else 1e-10) * max(1, abs(want))
    # A gradient below the smallest float32 is 0. In float64 rounding of D / tau itself, the exponent, shows.
    smallest = 1e-37 * z.numel() if dtype == torch.float32 else 1e-300
    exponent = z.double().square().mean().item() / (case["tau"] or 0.5) if KINDS[case["kind"]].log else 1.0
    steep = 1e-4 if dtype == torch.float32 else 1e-10 * max(1.0, 1e-4 * exponent)
    assert (gradient - slope).norm() <= steep * slope.norm() + smallest


CHECKED = [{"pool": "mean"}, {"pool": "tokens"}, {"normalize": "layer"}, {"normalize": "unit"}, {"normalize": "batch"}]
CHECKED += [{"norm_penalty": 0.3, "diagonal": False}, {"kind": "sphere", "normalize": "layer", "pool": "mean"}]


@pytest.mark.parametrize("options", CHECKED, ids=str)
def test_gradient_through_each_option_passes_gradcheck(options):
    assert gradcheck(lambda z: dispersive_loss(z, **options), (features(4, 3, 5, seed=1),))


@pytest.mark.parametrize(
    ("kind", "offset"), [*((kind, 0.0) for kind in KINDS), *((kind, 100.0) for kind in SHIFT_INVARIANT)]
)
def test_float32_products_are_accurate_for_large_features(kind, offset):
    z = (features(160, 4, 50).detach() + offset).float()
    assert engine.compute_dtype(z) == torch.float32
    got, gradient, want, slope = judged(z, {"kind": kind})
    assert abs(got - want) <= 1e-6 * max(1, abs(want))
    assert (gradient - slope).norm() <= 1e-4 * slope.norm()


def released(z, tau=0.5):
    z = z.flatten(1)
    d = F.pdist(z).square() / z.shape[1]
    return torch.exp(-torch.cat([d, d, d.new_zeros(len(z))]) / tau).mean().log()


def test_equals_the_released_form():
    z = features(16, 4, 8, scale=0.5)
    ours, theirs = (value_and_gradient(loss(z), z) for loss in (dispersive_loss, released))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shape", [(32, 96), (64, 32, 512)])  # in float64 inside, and in float32
def test_gradient_where_the_released_form_has_none(shape):
    z = features(*shape, dtype=torch.float32, scale=10.0)
    assert torch.autograd.grad(released(z), z)[0].abs().max() == 0
    (gradient,) = torch.autograd.grad(dispersive_loss(z, diagonal=False), z)
    assert gradient.isfinite().all() and gradient.norm() > 1e-4


def test_tokens_are_axis_one_of_sequences_and_pixels_of_maps_and_layer_is_per_token():
    z = features(4, 3, 2, 2)  # (B, C, H, W)
    tokens = z.flatten(2).transpose(1, 2)  # (B, N, C)
    normal = F.layer_norm(tokens, (3,), eps=1e-6)
    rows = [({"pool": "mean"}, tokens.mean(1)), ({"pool": "tokens"}, tokens.flatten(0, 1))]
    for options, same in [*rows, ({"normalize": "layer"}, normal)]:
        for form in (z, tokens):
            torch.testing.assert_close(dispersive_loss(form, **options), dispersive_loss(same))


@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if v.tau is not None and k != "vicreg"])
def test_auto_tau_is_the_median_distance(kind):
    z = features(9, 6)
    rows = F.normalize(z, dim=1) if KINDS[kind].unit else z
    D = distance(F.pdist(rows).square(), kind, 6).detach()
    auto, fixed = (dispersive_loss(z, kind=kind, tau=tau) for tau in ("auto", D.median().item()))
    torch.testing.assert_close(value_and_gradient(auto, z), value_and_gradient(fixed, z))  # held constant


def test_auto_tau_of_many_tokens_is_of_all_images():
    z = 3 * torch.randn(4, 1, 8) + 0.3 * torch.randn(4, 1024, 8)
    D = F.pdist(z.flatten(0, 1)).square() / 8
    auto, fixed = (dispersive_loss(z, pool="tokens", tau=tau).item() for tau in ("auto", D.median().item()))
    assert auto == pytest.approx(fixed, rel=0.05)
    try:
        torch.set_default_dtype(torch.bfloat16)  # which has no 4095
        assert dispersive_loss(z, pool="tokens", tau="auto").item() == auto
    finally:
        torch.set_default_dtype(torch.float32)


def masked(z, keep, tau=0.5):
    D = (z[:, None] - z).square().sum(2) / z.shape[1]
    return torch.logsumexp(-D[keep] / tau, 0) - math.log(int(keep.sum()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32, F64])
@pytest.mark.parametrize("diagonal", [True, False])
def test_pairs_of_one_class_or_far_in_time_do_not_count(diagonal, dtype):
    z, own = features(8, 5), torch.eye(8, dtype=torch.bool)
    y, t = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.tensor([0, 1, 2, 5, 7, 8, 99, 250])
    near = (t[:, None] - t).abs() <= 3
    assert (t[:, None] - t == 3).any()  # the end belongs to the window
    for options, keep in (
        ({"ignore_same_class": True, "y": y.to(dtype)}, y[:, None] != y),
        ({"t_window": 3.0, "t": t.to(dtype)}, near & ~own),
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
    sizes = [s * features(6, 4) for s in (0.1, 0.5, 1, 2, 8)]
    free, held = ([dispersive_loss(z, diagonal=False, norm_penalty=p).item() for z in sizes] for p in (0.0, 1.0))
    assert free == sorted(free, reverse=True) and min(held) not in (held[0], held[-1])


REFUSED = [
    ({"kind": "infonce-l2"}, "did you mean 'infonce_l2'"),
    *(({"tau": tau}, "tau") for tau in (0.0, math.nan, "Auto")),
    ({"tau": "auto", "kind": "vicreg"}, "tau"),
    ({"tau": 0.5, "kind": "covariance"}, "leave out tau"),
    ({"pool": "max"}, "none, mean, tokens"),
    ({"normalize": "l2"}, "none, layer, unit, batch"),
    ({"norm_penalty": -1.0}, "norm_penalty"),
    ({"norm_penalty": 1.0, "kind": "sphere"}, "norm_penalty"),
    ({"t_window": 0.0}, "t_window"),
    ({"t_window": 0.1}, "pass t="),
    ({"ignore_same_class": True}, "pass y="),
    ({"ignore_same_class": True, "kind": "vicreg"}, "leave out"),
    ({"diagonal": "no"}, "diagonal"),
    ({"y": torch.zeros(3)}, "y is"),
    ({"t": 0.5}, "t is"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda value: str(value)[:30])
def test_wrong_options_are_refused(options, words):
    with pytest.raises(DispersiveError, match=words):
        dispersive_loss(features(4, 3), **options)


WRONG = [*map(torch.zeros, [(4,), (), (0, 3), (4, 0)]), [[1.0, 2.0]], None, torch.zeros(4, 3).to_sparse()]


@pytest.mark.parametrize("z", [*WRONG, *(torch.zeros(4, 3, dtype=d) for d in (torch.long, torch.complex64))])
def test_wrong_features_are_refused(z):
    with pytest.raises(DispersiveError, match="features"):
        dispersive_loss(z)


def test_a_batch_of_one_is_zero_or_refused():
    assert dispersive_loss(features(1, 3)).item() == 0
    with pytest.raises(DispersiveError, match="at least 2"):
        dispersive_loss(features(1, 3), kind="covariance")


# ---- the engine: blocks, precision, autograd


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_rows_give_the_same(kind, monkeypatch):
    z = features(23, 7)
    masks = {} if kind in ("covariance", "vicreg") else {"ignore_same_class": True, "y": torch.arange(23) % 5}
    whole = value_and_gradient(dispersive_loss(z, kind=kind, **masks), z)
    monkeypatch.setattr(engine, "WHOLE", 23 * 6)
    monkeypatch.setattr(engine, "BLOCK", 23 * 6)
    assert len(engine._split(23)) == 4
    parts = value_and_gradient(dispersive_loss(z, kind=kind, **masks), z)
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_computed_in_float32(dtype):
    z = features(32, 8, 600, dtype=dtype)
    want, slope = value_and_gradient(dispersive_loss(z.float()), z)
    got, gradient = value_and_gradient(loss := dispersive_loss(z), z)
    assert abs(got - want) < 1e-7 and (gradient - slope).norm() <= 1e-2 * slope.norm()
    assert loss.dtype == torch.float32


def test_autocast_and_lowered_matmul_precision_change_nothing():
    z = features(48, 16, 200, dtype=torch.float32)
    want = value_and_gradient(dispersive_loss(z), z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = value_and_gradient(dispersive_loss(z), z)  # backward inside autocast too
    torch.set_float32_matmul_precision("medium")
    try:
        lowered = value_and_gradient(dispersive_loss(z), z)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for got in (cast, lowered):
        assert got[0] == want[0] and torch.equal(got[1], want[1])


def test_double_backward_is_refused_and_no_random_number_is_drawn():
    z, state = features(4, 5), torch.get_rng_state()
    for kind in KINDS:
        (gradient,) = torch.autograd.grad(dispersive_loss(z, kind=kind), z, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_identical_rows_are_finite(kind, diagonal):
    z = torch.ones(5, 4, dtype=F64, requires_grad=True)
    loss, gradient = value_and_gradient(dispersive_loss(z, kind=kind, diagonal=diagonal), z)
    assert loss.isfinite() and gradient.isfinite().all()
