"""The rivals: what alpha = 0 and alpha = 1 are, who gets the gradient, REPA with an encoder of real weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from nets import features
from sklearn.datasets import load_digits
from torch import nn

from dispersive_kit.errors import DispersiveError
from dispersive_kit.models import MLP, build_dit
from dispersive_kit.models.efficientnet import efficientnet_lite0, preprocess
from dispersive_kit.regularizers import (
    KINDS,
    REPA,
    Dispersive,
    LayerSync,
    NormMatched,
    Schedule,
    contrastive_loss,
    dispersive_loss,
)


def views(B=8, dim=6, noise=0.1):
    z = features(B, dim)
    return z, (z + noise * features(B, dim, seed=1)).detach().requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_zero_is_dispersive_loss_and_the_positive_term_pulls_the_views_together(kind):
    z, positive = views(noise=1.0)
    alone = dispersive_loss(z, kind=kind)
    assert contrastive_loss(z, positive, alpha=0.0, kind=kind) == alone
    at = [(positive + share * (z - positive)).detach() for share in (0.0, 0.5, 1.0)]
    terms = [(contrastive_loss(z, near, kind=kind) - alone).item() for near in at]
    assert terms[0] > terms[1] > terms[2]
    (pull,) = torch.autograd.grad(contrastive_loss(z, positive, kind=kind), positive)
    assert pull.norm() > 0


def test_infonce_is_simclr_with_the_log_outside_and_covariance_is_barlow_twins():
    # mutation: `_positive_term` not divided by tau
    z, positive = views()
    own, pair = ((z[:, None] - z).square().sum(2) / 6, (z - positive).square().sum(1) / 6)
    want = (pair / 0.5).mean() + torch.logsumexp(-own.flatten() / 0.5, 0) - math.log(64)
    torch.testing.assert_close(contrastive_loss(z, positive), want, rtol=1e-6, atol=1e-8)
    same = contrastive_loss(z, z, kind="covariance")  # of identical views only the off-diagonal is left
    torch.testing.assert_close(same, dispersive_loss(z, kind="covariance"))


@pytest.mark.parametrize(("alpha", "shape"), [(-0.1, (8, 6)), (1.1, (8, 6)), (1.0, (8, 5))])
def test_wrong_alpha_or_views_are_refused(alpha, shape):
    z, _ = views()
    with pytest.raises(DispersiveError, match="alpha"):
        contrastive_loss(z, torch.zeros(shape), alpha=alpha)


def test_layer_sync_teaches_the_shallow_block_only():
    # mutation: no `deep.detach()`
    model = MLP(hidden_size=16).train()
    sync = LayerSync(model, "blocks.0", "blocks.3", weight=0.2, schedule=Schedule("warmup", 2))
    x, t = torch.randn(6, 2), torch.rand(6)
    with sync:
        model(x, t)
    shallow, deep = sync.captured
    loss = sync.loss(step=0)
    torch.testing.assert_close(loss, -0.1 * F.cosine_similarity(shallow, deep, dim=1).mean())
    loss.backward()
    assert model.blocks[0].fc2.weight.grad.norm() > 0 and model.blocks[3].fc2.weight.grad is None


def test_repa_aligns_with_efficientnet_features_of_real_images():
    # mutation: encoder features not detached from x0 and `_alignment` of +cos
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:16] / 16 * 255).to(torch.uint8)[:, None]
    net = efficientnet_lite0()
    model = build_dit("DiT-T/2", input_size=8, depth=4, in_channels=1, num_classes=0).train()
    projector = nn.Sequential(nn.Linear(96, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1280))
    repa = REPA(model, encoder=lambda x: net.features(preprocess(x, size=32)), projector=projector, weight=1.0)
    x, t = images.float() / 127.5 - 1, torch.full((16,), 0.2)
    optimizer = torch.optim.AdamW([*model.parameters(), *projector.parameters()], lr=1e-3)
    losses = []
    for _ in range(12):
        with repa:
            model(x, t)
        loss = repa.loss(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3 and not any(p.grad is not None for p in net.parameters())
    assert model.blocks[0].attn.qkv.weight.grad is not None and model.blocks[1].attn.qkv.weight.grad is None


@pytest.mark.parametrize(("N", "bf16"), [(16, False), (9, False), (0, True)])
def test_repa_takes_features_of_tokens_or_of_the_image_and_refuses_others(N, bf16):
    model, x = build_dit("DiT-T/2", input_size=8, depth=2, num_classes=0).train(), torch.randn(3, 4, 8, 8)
    select = (lambda z: z.bfloat16()) if bf16 else None  # as under autocast
    encoder = lambda x: torch.ones(len(x), *[N] * (N > 0), 5)  # noqa: E731
    repa = REPA(model, encoder=encoder, projector=nn.Linear(96, 5), select=select)
    with repa:
        model(x, torch.rand(3))
    if N == 9:
        with pytest.raises(DispersiveError, match=r"blocks\.0.*\(3, 16, 5\).*\(3, 9, 5\)"):
            repa.loss(x)
    else:
        assert repa.loss(x).requires_grad


def test_the_placebo_is_the_squared_log_of_the_size_and_cares_for_no_spread():
    # mutation: NormMatched adds the Dispersive Loss it measures
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6))
    placebo = NormMatched(model, "0", rms=2.0, weight=0.5)
    for scale in (1.0, 3.0):
        for x in (torch.randn(8, 4), torch.ones(8, 4)):  # spread out, and all the same
            with placebo:
                z = model(scale * x)
            loss = placebo.loss()
            want = 0.5 * (z.square().mean().sqrt() / 2.0).log().square()
            torch.testing.assert_close(loss, want)
            (pull,) = torch.autograd.grad(loss, z)
            along = 1 if z.square().mean() > 4.0 else -1  # too large: descent shrinks it
            torch.testing.assert_close(pull / pull.norm(), along * z / z.norm())
    assert placebo.stats.loss == pytest.approx(0.0, abs=1e-6)  # of Dispersive Loss, on a batch of equal rows


def test_what_a_rival_cannot_do_is_refused():
    with pytest.raises(DispersiveError, match="rms"):
        NormMatched(nn.Sequential(nn.Linear(4, 6)), "0", rms=0.0)
    model = MLP(hidden_size=4)
    for blocks in (("0", "0"), ("2", "0")):
        with pytest.raises(DispersiveError, match="give a shallow module, which is taught, and a deeper one"):
            LayerSync(model, *(f"blocks.{block}" for block in blocks))
    assert not any(m._forward_hooks for m in model.modules())


def test_rivals_are_zero_in_eval_mode_and_say_so():
    model = MLP(hidden_size=4).eval()
    for reg, at in (
        (LayerSync(model, "blocks.0", "blocks.2"), "LayerSync on blocks.0, blocks.2"),
        (REPA(model, encoder=nn.Identity(), projector=nn.Identity()), "REPA on blocks.0"),
    ):
        with pytest.warns(UserWarning, match=f"{at} is 0 in eval mode"):
            assert reg.loss(*[torch.zeros(2)] * isinstance(reg, REPA)).item() == 0


def test_a_memory_of_features_of_another_size_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    reg = Dispersive(model, "0", memory=4)
    for size in (8, 6):
        with reg:
            model(torch.randn(2, 1, size, size))
        if size == 8:
            reg.loss(step=0)
    with pytest.raises(DispersiveError, match="one image size"):
        reg.loss(step=0)
