from collections.abc import Iterator
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from dispersive_kit.models.dit import DiT, build_dit
from dispersive_kit.regularizers import dispersive_loss
from dispersive_kit.views import model_plots as views
from dispersive_kit.views import style
from dispersive_kit.views.plots import pairwise_distances

TIMES = (0.02, 0.5, 0.98)


@pytest.fixture(autouse=True)
def clean_figures() -> Iterator[None]:
    plt.switch_backend("Agg")
    style()
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def model() -> DiT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_dit("DiT-T/2", input_size=8, in_channels=1, num_classes=3).eval()
        for block in model.blocks:
            torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def inside(model: DiT) -> dict[float, views.Inside]:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return {t: views.look_inside(model, x, t, torch.tensor([0, 2])) for t in TIMES}


def test_inside_is_what_the_library_computes(model: DiT, inside: dict[float, views.Inside]) -> None:
    now, t = inside[0.5], torch.full((2,), 0.5)
    with torch.no_grad():
        _, after = model(now.x, t, torch.tensor([0, 2]), taps=range(4))
    assert torch.allclose(now.rms, torch.stack([z.square().mean().sqrt() for z in after]))
    assert torch.allclose(now.change[1], (after[1] - after[0]).square().mean().sqrt())
    assert now.attention.shape == (4, 2, 16, 16)
    assert torch.allclose(now.attention.sum(-1), torch.ones(4, 2, 16))
    assert now.gates.shape == (4, 2) and bool((now.gates > 0).all())
    assert not any(block.attn.qkv._forward_hooks for block in model.blocks)


@pytest.mark.parametrize(("block", "t"), list(product((0, 3), TIMES)))
def test_a_block_frame_draws_and_keeps_its_axes_at_every_corner(
    inside: dict[float, views.Inside], block: int, t: float
) -> None:
    first, now = views.block_frame(inside, 0, 0.5), views.block_frame(inside, block, t)
    now.canvas.draw()
    assert [a.get_xlim() for a in first.axes] == [a.get_xlim() for a in now.axes]
    assert [a.get_ylim() for a in first.axes] == [a.get_ylim() for a in now.axes]


def test_patch_grids_count_tokens_and_pairs() -> None:
    figure = views.patch_grids(torch.zeros(1, 8, 8), (4, 1))
    assert [axis.get_title() for axis in figure.axes] == [
        "patch 4: 4 tokens, 16 pairs",
        "patch 1: 64 tokens, 4096 pairs",
    ]


@pytest.fixture(scope="module")
def taps() -> dict[str, views.TapView]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 6))
        x = torch.randn(16, 4)
    return views.look_through(model, lambda: model(x), ["0", "2"])


def test_looking_through_a_model_sees_each_tap_and_leaves_no_hook(taps: dict[str, views.TapView]) -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(2, 3)), torch.randn(5, 2)
    seen = views.look_through(model, lambda: model(x), ["0"])["0"]
    z = model(x).detach()
    assert seen.shape == (5, 3) and len(seen.distances) == 10
    assert seen.rms == pytest.approx(float(z.square().mean().sqrt()), rel=1e-5)
    assert not model[0]._forward_hooks
    assert [tap.shape for tap in taps.values()] == [(16, 8), (16, 6)]


def test_the_pull_is_the_gradient_along_the_features_and_dies_at_both_ends(taps: dict[str, views.TapView]) -> None:
    z = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(dispersive_loss(z, tau=0.7), z)
    tap = views.TapView((7, 5), pairwise_distances(z), 1.0, 1.0)
    assert tap.pull(0.7) == pytest.approx(-float((z * gradient).sum()))
    for one in taps.values():
        assert max(one.pull(1e-6), one.pull(1e6)) < 1e-3 < one.pull(float(np.median(one.distances)))


@pytest.mark.parametrize(("path", "tau"), list(product(("0", "2"), (1e-3, 20.0))))
def test_the_tap_chooser_draws_and_keeps_its_axes_at_every_corner(
    taps: dict[str, views.TapView], path: str, tau: float
) -> None:
    first, now = views.tap_frame(taps, "0"), views.tap_frame(taps, path, tau)
    now.canvas.draw()
    assert [a.get_xlim() for a in first.axes] == [a.get_xlim() for a in now.axes]
    assert [first.axes[k].get_ylim() for k in (0, 2)] == [now.axes[k].get_ylim() for k in (0, 2)]
