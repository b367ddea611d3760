"""The rivals: what alpha = 0 and alpha = 1 are, who gets the gradient, REPA with an encoder of real weights."""

import pytest
import torch
import torch.nn.functional as F
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

F64 = torch.float64


def views(B=8, dim=6, noise=0.1):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(B, dim, generator=generator, dtype=F64)
    return z.requires_grad_(), (
        z.detach() + noise * torch.randn(B, dim, generator=generator, dtype=F64)
    ).requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_zero_is_dispersive_loss(kind):
    z, positive = views()
    assert contrastive_loss(z, positive, alpha=0.0, kind=kind) == dispersive_loss(z, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_positive_term_falls_as_the_views_meet_and_pulls_them_together(kind):
    z, positive = views(noise=1.0)
    terms = []
    for share in (0.0, 0.5, 1.0):
        near = (positive + share * (z - positive)).detach().requires_grad_()
        terms.append((contrastive_loss(z, near, kind=kind) - dispersive_loss(z, kind=kind)).item())
    assert terms[0] > terms[1] > terms[2]
    (pull,) = torch.autograd.grad(contrastive_loss(z, positive, kind=kind), positive)
    assert pull.norm() > 0


def test_infonce_is_the_textbook_loss_of_simclr_with_the_log_outside():
    # mutation: `_positive_term` not divided by tau
    z, positive = views()
    D = lambda a, b: (a - b).square().sum(-1) / 6  # noqa: E731
    want = (
        (D(z, positive) / 0.5).mean() + torch.logsumexp(-D(z[:, None], z).flatten() / 0.5, 0) - torch.tensor(64.0).log()
    )
    torch.testing.assert_close(contrastive_loss(z, positive), want, rtol=1e-6, atol=1e-8)


def test_barlow_twins_with_identical_views_has_only_the_off_diagonal_left():
    z, _ = views(B=30)
    torch.testing.assert_close(contrastive_loss(z, z, kind="covariance"), dispersive_loss(z, kind="covariance"))


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
    with pytest.raises(DispersiveError, match="one shallow and one deep"):
        LayerSync(model, "blocks.0", "blocks.0")
    assert sum(len(m._forward_hooks) for m in model.modules()) == 2


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


def test_repa_takes_token_features_and_refuses_others():
    model = build_dit("DiT-T/2", input_size=8, depth=2, num_classes=0).train()
    x, t = torch.randn(3, 4, 8, 8), torch.rand(3)
    for N, right in ((16, True), (9, False)):
        repa = REPA(model, encoder=lambda x, N=N: torch.ones(len(x), N, 5), projector=nn.Linear(96, 5))
        with repa:
            model(x, t)
        if right:
            assert repa.loss(x).requires_grad
        else:
            with pytest.raises(DispersiveError, match=r"blocks\.0.*\(3, 16, 5\).*\(3, 9, 5\)"):
                repa.loss(x)
        repa.remove()
    model.eval()
    with pytest.warns(UserWarning, match="REPA on blocks.0 is 0 in eval mode"):
        assert REPA(model, encoder=torch.nn.Identity(), projector=nn.Identity()).loss(x).item() == 0


def test_repa_takes_features_in_bf16_outside_autocast_too():
    model = build_dit("DiT-T/2", input_size=8, depth=2, num_classes=0).train()
    repa = REPA(
        model, encoder=lambda x: torch.ones(len(x), 5), projector=nn.Linear(96, 5), select=lambda z: z.bfloat16()
    )
    with repa, torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(3, 4, 8, 8), torch.rand(3))
    assert repa.loss(torch.randn(3, 4, 8, 8)).requires_grad


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


def test_the_placebo_needs_a_size():
    with pytest.raises(DispersiveError, match="rms"):
        NormMatched(nn.Sequential(nn.Linear(4, 6)), "0", rms=0.0)


def test_layersync_is_told_which_block_is_the_shallow_one_and_warns_in_eval_mode():
    model = build_dit("DiT-T/2", input_size=8, depth=3, num_classes=0).eval()
    with pytest.raises(DispersiveError, match=r"blocks\.2 comes after blocks\.0"):
        LayerSync(model, "blocks.2", "blocks.0")
    sync = LayerSync(model, "blocks.0", "blocks.2")
    with pytest.warns(UserWarning, match="LayerSync on blocks.0, blocks.2 is 0 in eval mode"):
        assert sync.loss().item() == 0
    sync.remove()
    with pytest.raises(DispersiveError, match="were removed"):
        sync.loss()


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
