"""The DiT: published sizes, an independent re-statement of its block, options, and what it refuses."""

import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dispersive_kit.errors import ConfigError
from dispersive_kit.models.dit import DIT_CONFIGS, build_dit
from dispersive_kit.models.mlp import MLP

# Gflops (multiply-adds, 256 x 256 images, latents of 32 x 32) and parameters in millions, table 4 of arXiv 2212.09748.
PUBLISHED = {
    "DiT-S/8": (0.36, 33), "DiT-S/4": (1.41, 33), "DiT-S/2": (6.06, 33),
    "DiT-B/8": (1.42, 131), "DiT-B/4": (5.56, 130), "DiT-B/2": (23.01, 130),
    "DiT-L/8": (5.01, 459), "DiT-L/4": (19.70, 458), "DiT-L/2": (80.71, 458),
    "DiT-XL/8": (7.39, 676), "DiT-XL/4": (29.05, 675), "DiT-XL/2": (118.64, 675),
}  # fmt: skip


def randomised(model, seed=0, std=0.05):
    """Weights that make every path of the network count: the published initialisation closes the gates."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def batch(model, size=3, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, model.in_channels, model.input_size, model.input_size, generator=g, dtype=dtype)
    y = torch.randint(model.num_classes + 1, (size,), generator=g) if model.num_classes else None
    return x, torch.rand(size, generator=g, dtype=dtype), y


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_gflops_of_the_published_table(name):
    gflops, millions = PUBLISHED[name]
    with torch.device("meta"):
        model = build_dit(name, learn_sigma=True)
        x, t, y = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)
    with FlopCounterMode(display=False) as counter:
        model(x, t, y)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=0.01, abs=0.006)


def restated_forward(state, x, t, y, depth, heads, patch, grid, channels):
    """The published network from its formulas, on a plain state_dict; shares no code with the kit."""

    def linear(name, h):
        return h @ state[name + ".weight"].T + state[name + ".bias"]

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    frequencies = torch.tensor([10000 ** (-k / 128) for k in range(128)], dtype=torch.float64)
    angle = (1000 * t.double())[:, None] * frequencies
    c = torch.cat([angle.cos(), angle.sin()], 1).float()
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", c)))
    c = c + state["y_embedder.embedding_table.weight"][y]
    B, C = x.shape[:2]
    patches = x.reshape(B, C, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5).reshape(B, grid**2, -1)
    w = state["x_embedder.proj.weight"]
    h = patches @ w.reshape(w.shape[0], -1).T + state["x_embedder.proj.bias"] + state["pos_embed"]
    D = h.shape[-1]
    for i in range(depth):
        p = f"blocks.{i}."
        s1, a1, g1, s2, a2, g2 = linear(p + "adaLN_modulation.1", F.silu(c))[:, None].split(D, -1)
        q, k, v = linear(p + "attn.qkv", norm(h) * (1 + a1) + s1).split(D, -1)
        out = torch.empty_like(h)
        for j in range(heads):
            part = slice(j * D // heads, (j + 1) * D // heads)
            attention = (q[..., part] @ k[..., part].mT / math.sqrt(D / heads)).softmax(-1)
            out[..., part] = attention @ v[..., part]
        h = h + g1 * linear(p + "attn.proj", out)
        m = linear(p + "mlp.fc1", norm(h) * (1 + a2) + s2)
        m = 0.5 * m * (1 + torch.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m**3)))
        h = h + g2 * linear(p + "mlp.fc2", m)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c))[:, None].split(D, -1)
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    h = h.reshape(B, grid, grid, patch, patch, channels)
    return h.permute(0, 5, 1, 3, 2, 4).reshape(B, channels, grid * patch, grid * patch)


def test_forward_equals_an_independent_restatement_of_the_published_block():
    model = randomised(build_dit("DiT-T/2", input_size=8, in_channels=3, num_classes=5, learn_sigma=True))
    x, t, y = batch(model)
    expected = restated_forward(model.state_dict(), x, t, y, 4, 3, 2, 4, 6)
    assert expected.abs().mean() > 1e-2  # or the comparison would say nothing
    torch.testing.assert_close(model(x, t, y), expected, atol=1e-5, rtol=1e-5)


def test_position_embedding_equals_the_published_formula():
    model = build_dit("DiT-T/2", input_size=6)
    D, grid = 96, 3
    for row in range(grid):
        for column in range(grid):
            e = model.pos_embed[0, row * grid + column]
            for k in range(D // 4):
                omega = 10000 ** (-k / (D // 4))
                quarter = [math.sin(column * omega), math.cos(column * omega)]
                quarter += [math.sin(row * omega), math.cos(row * omega)]
                assert e[k :: D // 4].tolist() == pytest.approx(quarter, abs=1e-6)


def test_initialised_as_published():
    model = build_dit("DiT-T/2", input_size=8, in_channels=3, num_classes=5)
    x, t, y = batch(model)
    out, z = model(x, t, y, taps=(0, 3))
    assert out.abs().max() == 0
    torch.testing.assert_close(z[0], z[1], atol=0, rtol=0)  # every block is the identity
    assert all(b.adaLN_modulation[1].weight.count_nonzero() == 0 for b in model.blocks)
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert model.pos_embed.requires_grad is False


OPTIONS = [
    {},
    {"num_classes": 0},
    {"class_dropout_prob": 0.0},
    {"patch_size": 8},
    {"interval": True, "learn_sigma": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_trains_every_parameter_in_float64_too(options):
    model = build_dit("DiT-T/2", **{"input_size": 8, "in_channels": 3, "num_classes": 5, **options}).double()
    randomised(model)
    x, t, _ = batch(model, dtype=torch.float64)
    y = torch.tensor([0, 1, 4]) if model.num_classes else None
    out = model(x, t, y, r=t / 2) if options.get("interval") else model(x, t, y)
    assert out.shape == (3, 6 if options.get("learn_sigma") else 3, 8, 8) and out.dtype == torch.float64
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_checkpointing_changes_no_bit_of_output_gradient_or_taps():
    results = []
    for checkpointing in (False, True):
        model = randomised(build_dit("DiT-T/2", input_size=8, num_classes=5, checkpointing=checkpointing))
        out, taps = model(*batch(model), taps=(1,))
        (out.square().mean() + taps[0].square().mean()).backward()
        results.append([out, taps[0], *[p.grad for p in model.parameters() if p.grad is not None]])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_as_one_graph_with_taps(checkpointing):
    model = randomised(build_dit("DiT-T/2", input_size=8, num_classes=5, depth=2, checkpointing=checkpointing))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for value, expected in zip(compiled(*batch(model), taps=(1,)), model(*batch(model), taps=(1,)), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)


def test_per_block_compile_equals_eager():
    model = randomised(build_dit("DiT-T/2", input_size=8, num_classes=5, depth=2))
    expected = model(*batch(model))
    for block in model.blocks:
        block.compile(backend="aot_eager")
    torch.testing.assert_close(model(*batch(model)), expected, atol=1e-5, rtol=1e-4)


def test_taps_are_the_outputs_of_the_blocks_in_the_order_asked():
    model, seen = randomised(build_dit("DiT-T/2", input_size=8, num_classes=5)), {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out))
    _, taps = model(*batch(model), taps=(2, 0))
    assert torch.equal(taps[0], seen[2]) and torch.equal(taps[1], seen[0])


def test_autocast_keeps_the_output_near_float32():
    model = randomised(build_dit("DiT-T/2", input_size=8, num_classes=5))
    expected = model(*batch(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*batch(model))
    assert (out.float() - expected).norm() / expected.norm() < 0.02


def test_zero_interval_is_the_velocity():
    for model in (
        build_dit("DiT-T/2", input_size=8, num_classes=5, interval=True),
        MLP(num_classes=5, interval=True),
    ):
        randomised(model)
        t, y = torch.rand(4), torch.tensor([0, 1, 2, 5])
        x = torch.randn(4, 4, 8, 8) if hasattr(model, "input_size") else torch.randn(4, 2)
        assert torch.equal(model(x, t, y), model(x, t, y, r=t))
        assert not torch.allclose(model(x, t, y), model(x, t, y, r=t / 2))


@pytest.mark.parametrize("build", [partial(build_dit, "DiT-T/2", input_size=8, num_classes=0), MLP])
def test_what_meanflow_differentiates_along_t_is_told_t_and_not_a_thousand_times_it(build):
    def slope(**options):
        model = randomised(build(interval=True, **options))
        x, t = torch.randn(4, *model.sample_shape), torch.linspace(0.2, 0.8, 4)
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(lambda t: model(x, t, r=t / 2), (t,), (torch.ones(4),))[1].norm()

    torch.manual_seed(0)
    assert slope(time_scale=1000.0) > 50 * slope()
    assert build().time_scale == 1000


def test_unknown_size_name_is_told_what_exists():
    with pytest.raises(ConfigError) as error:
        build_dit("DiT-Q/2")
    assert all(size in str(error.value) for size in DIT_CONFIGS) and "1, 2, 4, 8" in str(error.value)
    with pytest.raises(ConfigError, match="patch of 1, 2, 4, 8"):
        build_dit("DiT-S/3")


def test_wrong_settings_are_refused_at_construction():
    with pytest.raises(ConfigError, match="not a multiple of patch_size 2"):
        build_dit("DiT-T/2", input_size=9)
    with pytest.raises(ConfigError, match="multiple of num_heads"):
        build_dit("DiT-T/2", num_heads=5)


@pytest.mark.parametrize(
    "build", [lambda: build_dit("DiT-T/2", input_size=8, num_classes=5), lambda: MLP(num_classes=5)]
)
def test_labels_outside_the_table_or_missing_are_refused(build):
    model = build()
    x = torch.zeros(2, 4, 8, 8) if hasattr(model, "input_size") else torch.zeros(2, 2)
    t = torch.zeros(2)
    model(x, t, torch.tensor([0, model.null_label]))
    for label in (-1, 6):
        with pytest.raises(ConfigError, match=f"label {label} is outside 0..5"):
            model(x, t, torch.tensor([0, label]))
    with pytest.raises(ConfigError, match="no labels"):
        model(x, t)


def test_wrong_image_size_or_unwanted_labels_are_refused():
    model = build_dit("DiT-T/2", input_size=8, num_classes=0)
    with pytest.raises(ConfigError, match=r"built for images \(B, 4, 8, 8\)"):
        model(torch.zeros(1, 4, 16, 16), torch.zeros(1))
    with pytest.raises(ConfigError, match="0 classes and was given labels"):
        model(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ConfigError, match="interval=True"):
        model(torch.zeros(1, 4, 8, 8), torch.zeros(1), r=torch.zeros(1))
    with pytest.raises(ConfigError, match=r"points \(B, 2\)"):
        MLP()(torch.zeros(1, 3), torch.zeros(1))
    with pytest.raises(ConfigError, match=r"t is \(\): give one time for each image"):
        model(torch.zeros(1, 4, 8, 8), torch.tensor(0.5))


@pytest.mark.parametrize("tap", [-1, 4])
def test_a_block_that_is_not_there_cannot_be_tapped(tap):
    for model, shape in ((build_dit("DiT-T/2", input_size=8, num_classes=0), (1, 4, 8, 8)), (MLP(depth=4), (1, 2))):
        with pytest.raises(ConfigError, match=f"no block {tap}: taps are counted from 0 to 3"):
            model(torch.zeros(shape), torch.zeros(1), taps=[tap])


def test_the_alternative_of_the_benchmark_is_the_same_network():
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        from public_style import PublicSiT
    finally:
        sys.path.remove(folder)
    model, public = randomised(build_dit("DiT-S/4", depth=2)), PublicSiT(depth=2).eval()
    public.load_state_dict(model.state_dict())
    x, t, y = batch(model)
    torch.testing.assert_close(model(x, t, y), public(x, 1000 * t, y), atol=1e-5, rtol=1e-5)


def test_the_residual_stream_is_contiguous():
    """As a transposed view of the patches, which the public code keeps, each layer norm would copy it first."""
    model = build_dit("DiT-T/2", input_size=8)
    _, taps = model(*batch(model), taps=(0, 3))
    assert all(z.is_contiguous() for z in taps)
