"""The rivals: who gets the gradient, what they are zero for, REPA with an encoder of real weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from nets import seen
from sklearn.datasets import load_digits
from torch import nn

from dispersive_kit.errors import DispersiveError
from dispersive_kit.models import MLP, build_dit
from dispersive_kit.models.efficientnet import efficientnet_lite0, preprocess
from dispersive_kit.regularizers import REPA, CleanPatch, Dispersive, LayerSync, NormMatched, Schedule


def test_layer_sync_teaches_the_shallow_block_only():
    # mutation: no `deep.detach()`
    model = MLP(hidden_size=16).train()
    sync = LayerSync(model, "blocks.0", "blocks.3", weight=0.2, schedule=Schedule("warmup", 2))
    x, t = torch.randn(6, 2), torch.rand(6)
    seen(sync, x, t)
    shallow, deep = sync.captured
    loss = sync.loss(step=0)
    torch.testing.assert_close(loss, -0.1 * F.cosine_similarity(shallow, deep, dim=1).mean())
    loss.backward()
    assert model.blocks[0].fc2.weight.grad.norm() > 0 and model.blocks[3].fc2.weight.grad is None
    maps = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).train()
    seen(sync := LayerSync(maps, "0", "2", weight=1.0), torch.randn(2, 2, 6, 8))  # (2, 8, 4, 6)
    shallow, deep = sync.captured
    torch.testing.assert_close(sync.loss(), -F.cosine_similarity(shallow, deep, dim=1).mean())


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
        seen(repa, x, t)
        loss = repa.loss(x0=images)
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
    seen(repa, x, torch.rand(3))
    if N == 9:
        with pytest.raises(DispersiveError, match=r"blocks\.0.*\(3, 16, 5\).*\(3, 9, 5\)"):
            repa.loss(x0=x)
    else:
        assert repa.loss(x0=x).requires_grad


def test_the_placebo_is_the_squared_log_of_the_size_and_cares_for_no_spread():
    # mutation: NormMatched adds the Dispersive Loss it measures
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6))
    placebo = NormMatched(model, "0", rms=2.0, weight=0.5)
    for scale in (1.0, 3.0):
        for x in (torch.randn(8, 4), torch.ones(8, 4)):  # spread out, and all the same
            z = seen(placebo, scale * x)
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
            assert reg.loss(x0=torch.zeros(2)).item() == 0


RIVALS = {
    "LayerSync": lambda model: LayerSync(model, "blocks.0", "blocks.1"),
    "REPA": lambda model: REPA(model, encoder=lambda x: x.flatten(1)[:, :5], projector=nn.Linear(96, 5)),
    "CleanPatch": lambda model: CleanPatch(model, patch_size=2, projector=nn.Linear(96, 16)),
}


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_that_would_do_nothing_raises(name):
    """Mutations: `Rival.loss` without `_take`, without its check of NaN, without its check of x0."""
    model, x = build_dit("DiT-T/2", input_size=8, depth=2, num_classes=0).train(), torch.randn(3, 4, 8, 8)
    rival = RIVALS[name](model)

    def loss(scale=1.0, **given):
        seen(rival, scale * x, torch.rand(3))
        return rival.loss(**given)

    assert loss(x0=x, t=torch.rand(3), y=torch.arange(3), step=0).requires_grad
    with pytest.raises(DispersiveError, match="captured nothing"):
        rival.loss(x0=x)
    with pytest.raises(DispersiveError, match="lower the learning rate"):
        loss(scale=math.nan, x0=x)
    with torch.no_grad(), pytest.raises(DispersiveError, match="no gradient"):
        loss(x0=x)
    if name != "LayerSync":
        with pytest.raises(DispersiveError, match="x0=x0"):
            loss()


def test_a_clean_patch_is_that_of_its_own_token():
    """Mutation: patches in another order than the tokens."""
    x0, model = torch.randn(2, 3, 8, 8), nn.Sequential(nn.Identity()).train()
    tokens = x0.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 4, 48).requires_grad_()
    head = CleanPatch(model, "0", patch_size=4, projector=nn.Identity(), weight=0.3)
    for given, want in ((tokens, 0.0), (tokens + 1, 0.3)):
        seen(head, given)
        torch.testing.assert_close(head.loss(x0=x0).item(), want)
    seen(head, tokens[:, :, :16])
    with pytest.raises(DispersiveError, match=r"\(2, 4, 16\).*\(2, 4, 48\)"):
        head.loss(x0=x0)


def test_a_memory_of_features_of_another_size_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    reg = Dispersive(model, "0", memory=4)
    for size in (8, 6):
        seen(reg, torch.randn(2, 1, size, size))
        if size == 8:
            reg.loss(step=0)
    with pytest.raises(DispersiveError, match="one image size"):
        reg.loss(step=0)
