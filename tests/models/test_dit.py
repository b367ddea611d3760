"""The DiT: published sizes, an independent re-statement of its block, options, and what it refuses."""

import math
from functools import partial

import pytest
import torch
from benchmarks.public_style import PublicSiT
from nets import randomised
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


def small(**options):
    return randomised(build_dit("DiT-T/2", **{"input_size": 8, "num_classes": 5, **options}))


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


def test_forward_equals_the_network_as_the_public_code_writes_it():
    model = small(in_channels=3, learn_sigma=True)
    public = PublicSiT(patch=2, depth=4, width=96, heads=3, size=8, channels=3, classes=5, out=6).eval()
    public.load_state_dict(model.state_dict())
    x, t, y = batch(model)
    expected = public(x, 1000 * t, y)
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


OPTIONS = [{}, {"num_classes": 0}, {"class_dropout_prob": 0.0}, {"patch_size": 8}]
OPTIONS.append({"interval": True, "learn_sigma": True})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_trains_every_parameter_in_float64_too(options):
    model = small(**{"in_channels": 3, **options}).double()
    x, t, _ = batch(model, dtype=torch.float64)
    y = torch.tensor([0, 1, 4]) if model.num_classes else None
    out = model(x, t, y, r=t / 2) if options.get("interval") else model(x, t, y)
    assert out.shape == (3, 6 if options.get("learn_sigma") else 3, 8, 8) and out.dtype == torch.float64
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_checkpointing_changes_no_bit_of_output_gradient_or_taps():
    results = []
    for checkpointing in (False, True):
        model = small(checkpointing=checkpointing)
        out, taps = model(*batch(model), taps=(1,))
        (out.square().mean() + taps[0].square().mean()).backward()
        results.append([out, taps[0], *[p.grad for p in model.parameters() if p.grad is not None]])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("how", ["whole", "whole, checkpointing", "by block"])
def test_compiled_it_is_the_same_network(how):
    model = small(depth=2, checkpointing="checkpointing" in how)
    expected = model(*batch(model), taps=(1,))
    if how == "by block":
        for block in model.blocks:
            block.compile(backend="aot_eager")
    compiled = model if how == "by block" else torch.compile(model, fullgraph=True, backend="aot_eager")
    for value, want in zip(compiled(*batch(model), taps=(1,)), expected, strict=True):
        torch.testing.assert_close(value, want, atol=1e-5, rtol=1e-4)


def test_taps_are_the_outputs_of_the_blocks_in_the_order_asked_and_contiguous():
    """As a transposed view of the patches, which the public code keeps, each layer norm would copy the stream first."""
    model, seen = small(), {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out))
    _, taps = model(*batch(model), taps=(2, 0))
    assert torch.equal(taps[0], seen[2]) and torch.equal(taps[1], seen[0])
    assert all(z.is_contiguous() for z in taps)


def test_autocast_keeps_the_output_near_float32():
    model = small()
    expected = model(*batch(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*batch(model))
    assert (out.float() - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("build", [small, lambda **options: randomised(MLP(num_classes=5, **options))])
def test_zero_interval_is_the_velocity(build):
    model = build(interval=True)
    x, t, y = torch.randn(4, *model.sample_shape), torch.rand(4), torch.tensor([0, 1, 2, 5])
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


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("DiT-Q/2", {}, ", ".join(DIT_CONFIGS)),
        ("DiT-S/3", {}, "patch of 1, 2, 4, 8"),
        ("DiT-T/2", {"input_size": 9}, "not a multiple of patch_size 2"),
        ("DiT-T/2", {"num_heads": 5}, "multiple of num_heads"),
    ],
)
def test_wrong_names_and_settings_are_refused_at_construction(name, options, words):
    with pytest.raises(ConfigError, match=words):
        build_dit(name, **options)


@pytest.mark.parametrize("build", [partial(build_dit, "DiT-T/2", input_size=8), MLP])
def test_wrong_inputs_are_refused(build):
    labelled, free = build(num_classes=5), build(num_classes=0)
    x, t, y = torch.zeros(2, *free.sample_shape), torch.zeros(2), torch.tensor([0, 5])
    labelled(x, t, y)  # 5 is the null class
    for model, args, options, words in (
        (labelled, (x, t, y - 1), {}, "label -1 is outside 0..5"),
        (labelled, (x, t, y + 1), {}, "label 6 is outside 0..5"),
        (labelled, (x, t), {}, "no labels"),
        (free, (x, t, y), {}, "0 classes and was given labels"),
        (free, (x.repeat_interleave(2, 1), t), {}, r"built for (images \(B, 4, 8, 8\)|points \(B, 2\))"),
        (free, (x, torch.tensor(0.5)), {}, r"t is \(\): give one time for each image"),
        (free, (x, t), {"r": t}, "interval=True"),
        (free, (x, t), {"taps": [-1]}, "no block -1: taps are counted from 0 to 3"),
        (free, (x, t), {"taps": [4]}, "no block 4"),
    ):
        with pytest.raises(ConfigError, match=words):
            model(*args, **options)
