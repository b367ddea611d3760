"""Figures of the lessons on models: inside a DiT block by block, and which module of a model to tap."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from dispersive_kit.models.dit import DiT
from dispersive_kit.regularizers import Dispersive
from dispersive_kit.views.plots import pairwise_distances
from dispersive_kit.views.toy_plots import BLUE, GREEN, GREY, RED


class Inside(NamedTuple):
    """What goes on in each block of a DiT at one time: images x (B, C, H, W), attention (depth, B, N, N), its mean over
    heads, gates (depth, 2), the RMS of those of attention and MLP, and rms and change (depth,), of the block's output
    and of what the block added to it.
    """

    x: Tensor
    attention: Tensor
    gates: Tensor
    rms: Tensor
    change: Tensor


@torch.no_grad()
def look_inside(model: DiT, x: Tensor, t: float, y: Tensor) -> Inside:
    """Of a DiT without rope and without normalised queries; x (B, C, H, W) noisy at time t, y (B,)."""
    qkv: list[Tensor] = []
    blocks: list[Any] = list(model.blocks)
    hooks = [block.attn.qkv.register_forward_hook(lambda _m, _a, out: qkv.append(out)) for block in blocks]
    time = torch.full((len(x),), t)
    _, after = model(x, time, y, taps=range(len(blocks)))
    for hook in hooks:
        hook.remove()
    before = [model.x_embedder(x) + model.pos_embed, *after[:-1]]
    c = model.condition(time, y, None)
    gates = [block.adaLN_modulation(c).chunk(6, dim=1)[2::3] for block in blocks]  # (gate_a, gate_m)
    return Inside(
        x,
        torch.stack([_attention(one, model.num_heads) for one in qkv]),
        torch.tensor([[float(gate.square().mean().sqrt()) for gate in pair] for pair in gates]),
        torch.stack([z.square().mean().sqrt() for z in after]),
        torch.stack([(z - old).square().mean().sqrt() for z, old in zip(after, before, strict=True)]),
    )


def _attention(qkv: Tensor, heads: int) -> Tensor:
    q, k, _ = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads)
    return F.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1).mean(1)  # (B, N, N)


def patch_grids(image: Tensor, patch_sizes: Sequence[int]) -> Figure:
    """An image (C, H, W) in [-1, 1] cut into patches of each size: N tokens, and N^2 pairs for attention."""
    figure, axes = plt.subplots(1, len(patch_sizes), figsize=(3 * len(patch_sizes), 3.2), squeeze=False)
    for axis, p in zip(axes[0], patch_sizes, strict=True):
        N = (image.shape[-1] // p) ** 2
        _picture(axis, image, p)
        axis.set_title(f"patch {p}: {N} tokens, {N * N} pairs", fontsize=10)
    return figure


def _picture(axis: Axes, image: Tensor, p: int) -> None:
    size = image.shape[-1]
    axis.imshow(image.mean(0), cmap="gray", vmin=-1, vmax=1, extent=(0, size, size, 0))
    axis.set(xticks=range(0, size + 1, p), yticks=range(0, size + 1, p), xticklabels=[], yticklabels=[])
    axis.grid(True, color=RED, alpha=0.8)


def block_frame(inside: Mapping[float, Inside], block: int, t: float, *, token: int = 5, image: int = 0) -> Figure:
    """One block at one time: the image, whom one token looks at, the gates over time, and features along the blocks.

    inside: `look_inside` at each time; `token` of `image` is the star.
    """
    now = inside[t]
    side = int(now.attention.shape[-1] ** 0.5)
    p = now.x.shape[-1] // side
    figure, axes = plt.subplots(1, 4, figsize=(12.4, 3.3), width_ratios=(1, 1.15, 1.2, 1.2))
    _picture(axes[0], now.x[image], p)
    axes[0].plot((token % side + 0.5) * p, (token // side + 0.5) * p, "*", color=RED, markersize=14)
    axes[0].set_title(f"input at t = {t:g}", fontsize=10)
    shares = axes[1].imshow(now.attention[block, image, token].view(side, side), vmin=0, vmax=0.3)
    axes[1].plot(token % side, token // side, "*", color=RED, markersize=14)
    axes[1].set(xticks=[], yticks=[], title=f"block {block}: the star attends to")
    axes[1].grid(False)
    figure.colorbar(shares, ax=axes[1], extend="max", shrink=0.7)
    _gates_over_time(axes[2], inside, block, t)
    _along_the_blocks(axes[3], now, block, max(float(one.rms.max()) for one in inside.values()))
    for axis in axes[1:]:
        axis.title.set_fontsize(10)
    return figure


def _gates_over_time(axis: Axes, inside: Mapping[float, Inside], block: int, t: float) -> None:
    gates = torch.stack([one.gates[block] for one in inside.values()])  # (times, 2)
    axis.plot(list(inside), gates[:, 0], "o-", color=BLUE, markersize=4, label="attention")
    axis.plot(list(inside), gates[:, 1], "s--", color=GREEN, markersize=4, label="MLP")
    axis.axvline(t, color=GREY)
    top = 1.3 * max(float(one.gates.max()) for one in inside.values())
    axis.set(xlabel="t", ylim=(0, max(top, 0.01)), title=f"block {block}: size of its gates")
    axis.legend(fontsize=8, loc="upper center", ncols=2)


def _along_the_blocks(axis: Axes, now: Inside, block: int, top: float) -> None:
    at = np.arange(len(now.rms))
    axis.bar(at - 0.2, now.rms.tolist(), 0.4, color=BLUE, label="RMS of its output")
    axis.bar(at + 0.2, now.change.tolist(), 0.4, color="none", edgecolor=GREEN, hatch="//", label="of what it added")
    axis.plot(block - 0.2, float(now.rms[block]) + 0.06 * top, "v", color=RED, markersize=9)
    axis.set(xticks=at, xlabel="block", ylim=(0, 1.35 * top), title="features along the blocks")
    axis.legend(fontsize=8, loc="upper left")


class TapView(NamedTuple):
    """What a tap sees in one batch of B: shape of z, |z_i - z_j|^2 / dim of the pairs i < j, RMS, effective rank."""

    shape: tuple[int, ...]
    distances: NDArray[np.float64]
    rms: float
    rank: float

    def pull(self, tau: float) -> float:
        """-sum_i <z_i, dL/dz_i> = (2 / tau) sum_ij p_ij D_ij of the l2 form, the diagonal counted: how much the loss
        falls when all features grow by a small share. Zero where pairs are too near, or too far, for tau.
        """
        kernel = np.exp(-self.distances / tau)
        return float(2 / tau * 2 * (kernel * self.distances).sum() / (self.shape[0] + 2 * kernel.sum()))


def look_through(model: nn.Module, call: Callable[[], Any], paths: Sequence[str]) -> dict[str, TapView]:
    """`call()` runs the model in training mode on one batch; every path is tapped in turn, without a gradient."""
    seen = {}
    for path in paths:
        reg = Dispersive(model, path, weight=0.0)
        with reg:
            call()
        z = reg.captured[0].detach()
        reg.loss()
        seen[path] = TapView(tuple(z.shape), pairwise_distances(z), reg.stats.feature_rms, reg.stats.effective_rank)
        reg.remove()
    return seen


PULL_TAUS = np.geomspace(1e-3, 1e2, 61)


def tap_frame(taps: Mapping[str, TapView], path: str, tau: float = 0.5) -> Figure:
    """Choosing a tap: size of the features along the model, pairs at this tap against tau, the pull at every tau."""
    figure, axes = plt.subplots(1, 3, figsize=(12.4, 3.7), width_ratios=(1.1, 1, 1))
    names, at = list(taps), np.arange(len(taps))
    colors = [RED if name == path else GREY for name in names]
    axes[0].barh(at, [tap.rms for tap in taps.values()], color=colors)
    for i, tap in enumerate(taps.values()):
        axes[0].annotate(f"{tap.rms:.2g}  {tap.shape}", (0, i), xytext=(4, 0), textcoords="offset points", va="center")
    axes[0].set(yticks=at, yticklabels=names, title="RMS and shape of z")
    axes[0].invert_yaxis()
    axes[1].hist(np.clip(taps[path].distances, 1e-3, 1e2), bins=PULL_TAUS[::2].tolist(), color=BLUE)
    axes[1].axvline(tau, color=RED, linestyle="--", label=f"tau = {tau:g}")
    axes[1].set(xscale="log", xlim=(1e-3, 1e2), xlabel="squared distance / dim", title=f"pairs at {path}")
    axes[1].set_yticks([])
    for name, tap in taps.items():
        chosen = {"color": RED, "linewidth": 2.5, "zorder": 3} if name == path else {"color": GREY, "linewidth": 1}
        axes[2].plot(PULL_TAUS, [tap.pull(float(one)) for one in PULL_TAUS], **chosen)
    axes[2].plot(tau, taps[path].pull(tau), "D", color=RED, markersize=9)
    axes[2].set(xscale="log", xlim=(1e-3, 1e2), ylim=(0, 5), xlabel="tau", title="pull of the l2 form")
    axes[1].legend(fontsize=9)
    return figure
