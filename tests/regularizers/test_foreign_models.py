"""On models of other libraries, unchanged."""

import diffusers
import pytest
import torch
import torchvision

from dispersive_kit.errors import DispersiveError
from dispersive_kit.regularizers import Dispersive, dispersive_loss


def unet():
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    sizes = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "attention_head_dim": 8}
    model = diffusers.UNet2DModel(**sizes, norm_num_groups=4, down_block_types=down, up_block_types=up)
    return model, lambda: model(torch.randn(4, 3, 8, 8), torch.rand(4) * 999).sample


def transformer():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8}
    model = diffusers.DiTTransformer2DModel(**sizes, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4)
    y = torch.randint(0, 10, (4,))
    return model, lambda: model(torch.randn(4, 4, 8, 8), torch.randint(0, 10, (4,)), class_labels=y).sample


def resnet():
    model = torchvision.models.resnet18(num_classes=5)
    return model, lambda: model(torch.randn(4, 3, 32, 32))


CASES = [
    (unet, "mid_block", (4, 32, 4, 4)),
    (unet, "down_blocks.0", (4, 16, 4, 4)),  # gives (hidden_states, (residuals, ...))
    (unet, "up_blocks.*.resnets.0", None),
    (transformer, "transformer_blocks.0", (4, 16, 16)),
    (resnet, "layer2", (4, 128, 4, 4)),
    (resnet, "layer3.1.relu", (4, 256, 2, 2)),  # called twice in a block: the first call counts
]


@pytest.mark.parametrize(("make", "path", "shape"), CASES, ids=[f"{m.__name__}-{p}" for m, p, _ in CASES])
def test_three_lines_on_an_unchanged_model(make, path, shape):
    torch.manual_seed(0)
    model, call = make()
    model.train()
    keys = list(model.state_dict())
    reg = Dispersive(model, path, weight=0.5, tau=0.5, pool="mean")
    with reg:
        out = call()
    zs = reg.captured
    assert shape is None or zs[0].shape == shape
    loss = reg.loss()
    want = 0.5 * torch.stack([dispersive_loss(z, tau=0.5, pool="mean") for z in zs]).mean()
    torch.testing.assert_close(loss, want)
    assert all(g.norm() > 0 for g in torch.autograd.grad(want, zs, retain_graph=True))
    (out.square().mean() + loss).backward()
    reg.remove()
    assert list(model.state_dict()) == keys and not any(m._forward_hooks for m in model.modules())


def test_an_output_overwritten_in_place_raises_instead_of_being_another_module():
    model, call = resnet()
    reg = Dispersive(model.train(), "bn1")  # torchvision's ReLU(inplace=True) follows
    with reg:
        call()
    with pytest.raises(DispersiveError, match=r"'bn1'.*inplace=True"):
        reg.loss()
