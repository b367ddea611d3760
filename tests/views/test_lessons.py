"""What the lessons show: true to the library, and drawn on axes that do not move with the sliders."""

import inspect
import math
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from dispersive_kit.data import load_images
from dispersive_kit.diffusion.objectives import FlowMatching
from dispersive_kit.diffusion.samplers import rk4
from dispersive_kit.models.dit import build_dit
from dispersive_kit.regularizers import dispersive_loss
from dispersive_kit.study.verdict import all_verdicts
from dispersive_kit.views import lessons, show_source, style
from dispersive_kit.views.console import patches
from dispersive_kit.views.figures import pairwise_distances


@pytest.fixture(autouse=True)
def clean_figures():
    plt.switch_backend("Agg")
    style()
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_dit("DiT-T/2", input_size=8, in_channels=1, num_classes=3).eval()
        for block in model.blocks:
            torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def inside(model):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return lessons.BlockViews(model, dict.fromkeys((0.02, 0.5, 0.98), x), torch.tensor([0, 2]))


@pytest.fixture(scope="module")
def taps():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 6))
        x = torch.randn(16, 4)
    views = lessons.TapViews(model, lambda: model(x), ["0", "2"])
    assert not any(module._forward_hooks for module in model)
    return views


def test_a_frame_keeps_its_axes_at_every_corner_of_its_sliders(taps):
    def axes(figure):
        figure.canvas.draw()
        return [(axis.get_xlim(), axis.get_ylim()) for axis in figure.axes]

    first, *others = (axes(taps.frame(*corner)) for corner in product(("0", "2"), (1e-3, 20.0)))
    assert all(other[0::2] == first[0::2] and other[1][0] == first[1][0] for other in others)  # counts are of the tap


def test_the_conditional_velocity_is_that_of_the_class_and_the_null_class_is_all():
    x, t = torch.randn(6, 2, dtype=torch.float64), torch.full((6,), 0.4, dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1, lessons.NULL, lessons.NULL])
    mixed = lessons.exact_velocity(x, t, y)
    for k in range(3):
        assert torch.allclose(mixed[y == k], lessons.exact_velocity(x, t, torch.full((6,), k))[y == k])
    assert torch.allclose(mixed[4:], lessons.exact_velocity(x, t)[4:])


def test_a_larger_cloud_holds_the_smaller_one_and_fills_its_disc():
    large = lessons.cloud(64)
    assert torch.equal(large[:8], lessons.cloud(8)) and large.norm(dim=1).max() <= 1.3
    assert pairwise_distances(large).min() > 0.005 and large.mean(0).norm() < 0.1


def test_inside_is_what_the_library_computes(model, inside):
    t = torch.full((2,), 0.5)
    with torch.no_grad():
        _, after = model(inside.inputs[0.5], t, torch.tensor([0, 2]), taps=range(4))
    assert torch.allclose(inside.features[0.5], torch.stack(after))
    assert inside.attention[0.5].shape == (4, 2, model.num_heads, 16, 16)
    assert torch.allclose(inside.attention[0.5].sum(-1), torch.ones(4, 2, model.num_heads, 16))
    gate = model.blocks[1].adaLN_modulation(model.condition(t, torch.tensor([0, 2]), None)).chunk(6, 1)[5]
    assert torch.allclose(inside.gates[0.5][1, 1], gate.square().mean().sqrt())
    assert inside.gates[0.5].shape == (4, 2) and not any(block.attn.qkv._forward_hooks for block in model.blocks)


def test_a_patch_is_told_whom_it_attends_to_and_the_nearest_of_all_images(inside):
    spec = patches(inside).spec
    assert [len(values) for values in spec["controls"].values()] == [2, 3, 4, 3] and spec["side"] == 4
    z = inside.features[0.5][3].flatten(0, 1).double()
    apart = torch.cdist(z, z).fill_diagonal_(math.inf)
    assert apart[21, spec["nearest"][1][1][3][5]].tolist() == pytest.approx(apart[21].sort().values[:6].tolist(), 1e-3)
    shares = torch.tensor(spec["attention"][1][1][3][2][5])
    assert torch.allclose(shares, inside.attention[0.5][3, 1, 2, 5], atol=0.006)


def test_the_pull_is_the_gradient_along_the_features_and_dies_at_both_ends(taps):
    z = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(dispersive_loss(z, tau=0.7), z)
    assert lessons.pull_of(pairwise_distances(z), 7, 0.7) == pytest.approx(-(z * gradient).sum().item())
    assert [tuple(z.shape) for z in taps.z.values()] == [(16, 8), (16, 6)]
    assert taps.rms["2"] == pytest.approx(float(taps.z["2"].square().mean().sqrt()), rel=1e-5)
    distances = taps.distances["0"]
    assert len(distances) == 120
    ends = [lessons.pull_of(distances, 16, tau) for tau in (1e-6, 1e6)]
    assert max(ends) < 1e-3 < lessons.pull_of(distances, 16, float(np.median(distances)))


def test_code_on_a_page_is_the_code_that_runs_from_the_margin_and_in_colour(monkeypatch):
    displayed = []
    monkeypatch.setattr("IPython.display.display", displayed.append)
    show_source(FlowMatching.loss)
    show_source(rk4)
    method, sampler = displayed
    compile("from __future__ import annotations\n" + method.data, "shown", "exec")
    assert method.data.startswith("def loss(")
    assert "def rk4(f: " in sampler.data and "def run" not in sampler.data
    assert list(inspect.signature(rk4).parameters)[:3] == ["model", "x", "ts"]
    assert "<span" in sampler._repr_html_() and "://" not in sampler._repr_html_()


def test_the_map_has_a_point_for_each_contrast_with_base_at_the_epochs_of_the_base():
    drawn = [
        ("paper", "held_out", 15, 0.0, {}),
        ("paper", "held_out", 7000, -0.05, {}),
        ("small", "frechet", 15, 0.1, {}),
        ("paper", "held_out", 700, 0.1, {"against": "placebo"}),
        ("cosine", "held_out", 15, 0.1, {}),
    ]
    rows = [
        {"arm": arm, "measure": measure, "epochs": epochs, "low": -0.1, "mean": mean, "high": 0.2, **more}
        for arm, measure, epochs, mean, more in drawn
    ]
    held_out, frechet = lessons.regime_map(rows).axes
    (x, y), (x2, y2) = (axis.containers[i].lines[0].get_data() for axis, i in ((held_out, 0), (frechet, 1)))
    assert y == pytest.approx([1, np.exp(-0.05)]) and y2 == pytest.approx([np.exp(0.1)])
    assert abs(np.log([x[0] / 15, x[1] / 7000, x2[0] / 15])).max() < 0.3 and x[1] < held_out.get_xlim()[1]
    assert sum(len(bar.lines[0].get_xdata()) for axis in (held_out, frechet) for bar in axis.containers) == 3


def test_epochs_count_how_often_the_base_saw_each_training_image():
    epochs = {v["study"]: v["epochs"] for v in all_verdicts()}
    assert epochs["2a-published-short"] == pytest.approx(300 * 64 / len(load_images("digits", "train")))
    assert epochs["5b-data-share"] in (pytest.approx(300 * 64 / 129.7), pytest.approx(300 * 64 / 389.1))
