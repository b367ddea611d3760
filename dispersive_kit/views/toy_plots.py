"""Figures of the notebooks on points: 2-D sets, velocity fields, and Dispersive Loss on a cloud of points.

Each is a function of its state alone, returns a Figure and keeps its axes whatever the state, so that a slider moves
what is drawn and nothing else. Frames for sliders are laid out by hand, which draws twice as fast as a layout engine.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from dispersive_kit.views.plots import DASHES, MARKERS, OKABE_ITO

Field = Callable[[Tensor, Tensor], Tensor]  # v(x (B, 2), t (B,)) -> (B, 2)

BLUE, RED, GREEN, GREY = *OKABE_ITO[:3], "0.55"
EXTENT = 2.8  # half side of every picture of a 2-D set
RADIUS = 1.3  # of the playground's cloud at scale 1
CLOUD_EXTENT = 7.8  # half side of its picture: the largest scale, and its arrows
ARROW = 1.3  # length of an arrow for a gradient of 1 or more; none below 1e-3, logarithmic between

# What the playground offers: name -> (options of the loss, y axis)
VARIANTS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "l2": ({"kind": "infonce_l2"}, (-5.0, 0.6)),
    "l2, no diagonal": ({"kind": "infonce_l2", "diagonal": False}, (-5.0, 0.6)),
    "cosine": ({"kind": "infonce_cosine"}, (-1.2, 4.3)),
    "hinge": ({"kind": "hinge"}, (-0.15, 4.2)),
    "covariance": ({"kind": "covariance"}, (0.4, 1.05)),
}
GRID = np.geomspace(0.1, 6.0, 15)  # scales of the curve beside the cloud


def two_axes(width: float = 10.0, height: float = 3.9) -> tuple[Figure, Axes, Axes]:
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(width, height), layout="none", gridspec_kw={"width_ratios": (1, 1.45)}
    )
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.14, top=0.9, wspace=0.22)
    return figure, left, right


def square(axis: Axes, title: str = "", extent: float = EXTENT) -> None:
    axis.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", title=title)


def point_panels(sets: Mapping[str, Tensor], *, width: float = 10.0) -> Figure:
    """Sets of points (n, 2) side by side, one panel each, on the same axes."""
    figure, axes = plt.subplots(1, len(sets), figsize=(width, width / len(sets) + 0.35), squeeze=False)
    for axis, (name, x) in zip(axes[0], sets.items(), strict=True):
        axis.plot(x[:, 0], x[:, 1], ".", color=BLUE, markersize=2, alpha=0.5)
        square(axis, name)
    return figure


def field_panels(fields: Mapping[str, Field], points: Tensor, t: float) -> Figure:
    """Two velocity fields at time t as arrows, and how far apart they are, over points x_t (n, 2) in grey.

    Arrows have one scale in both panels and at every t; the difference |v_1 - v_2| is cut off at 2.
    """
    line = torch.linspace(-2.5, 2.5, 15)
    x = torch.cartesian_prod(line, line)  # (225, 2)
    fine = torch.cartesian_prod(*[torch.linspace(-EXTENT, EXTENT, 57)] * 2)
    with torch.no_grad():
        at = {name: v(x, torch.full((len(x),), t)) for name, v in fields.items()}
        first, second = (v(fine, torch.full((len(fine),), t)) for v in fields.values())
    apart = (first - second).norm(dim=1).reshape(57, 57).T
    figure, axes = plt.subplots(1, 3, figsize=(10.6, 3.7), layout="none")
    figure.subplots_adjust(left=0.04, right=0.93, bottom=0.08, top=0.9, wspace=0.16)
    for axis, (name, v), color in zip(axes, at.items(), (BLUE, RED), strict=False):
        axis.plot(points[:, 0], points[:, 1], ".", color="0.75", markersize=1.5, zorder=0)
        axis.quiver(x[:, 0], x[:, 1], v[:, 0], v[:, 1], color=color, scale=55, width=0.005)
        square(axis, f"{name}, t = {t:g}")
    image = axes[2].imshow(apart, origin="lower", extent=[-EXTENT, EXTENT] * 2, vmin=0, vmax=2)
    axes[2].plot(points[:, 0], points[:, 1], ".", color="white", markersize=0.8, alpha=0.5)
    square(axes[2], "distance between them")
    axes[2].grid(False)
    bar = figure.add_axes((0.945, 0.14, 0.012, 0.7))
    figure.colorbar(image, cax=bar, extend="max")
    return figure


def stage_frame(data: Tensor, samples: Sequence[Tensor], errors: Sequence[tuple[int, float]], stage: int) -> Figure:
    """Left: samples (n, 2) of one stage of training over the data. Right: the error of the field at every stage.

    errors: (training step, error) of each stage, in the order of `samples`.
    """
    figure, left, right = two_axes()
    left.plot(data[:, 0], data[:, 1], ".", color="0.7", markersize=2, label="data")
    left.plot(*samples[stage].T, "x", color=RED, markersize=3, alpha=0.6, label="samples")
    square(left, f"after {errors[stage][0]} steps")
    left.legend(loc="center", fontsize=9, markerscale=2)
    steps, values = zip(*((max(step, 1), value) for step, value in errors), strict=True)
    right.plot(steps, values, "o-", color=BLUE)
    right.plot(steps[stage], values[stage], "D", color=RED, markersize=11)
    right.set(xscale="log", yscale="log", ylim=(0.01, 3), title="error of the learned velocity")
    right.set(xlabel="training step (the untrained net at 1)", ylabel="share of |v|² missed")
    return figure


def error_curves(arms: Mapping[str, Sequence[tuple[int, float]]], rms: Mapping[str, Sequence[float]]) -> Figure:
    """Error of the field, and feature RMS of the tapped block, against the training step, one line an arm."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for i, (arm, errors) in enumerate(arms.items()):
        steps, values = zip(*((max(step, 1), value) for step, value in errors), strict=True)
        look = {"color": OKABE_ITO[i], "linestyle": DASHES[i], "marker": MARKERS[i], "label": arm}
        axes[0].plot(steps, values, **look)
        axes[1].plot(steps, rms[arm], **look)
    for axis, label in zip(axes, ("share of |v|² missed", "feature RMS of the block"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="training step (the untrained net at 1)", ylabel=label)
    axes[0].legend()
    return figure


@cache
def cloud(B: int) -> Tensor:
    """B points of a disc (B, 2), float64, the same each time: every next one is as far from those before as it can be.

    So a larger batch has the points of a smaller one, and its points are nearer to each other.
    """
    rng = torch.Generator().manual_seed(3)
    radius, turn = torch.rand(2, 800, generator=rng, dtype=torch.float64)
    angle = 2 * math.pi * turn
    disc = RADIUS * radius.sqrt()[:, None] * torch.stack([angle.cos(), angle.sin()], 1)  # (800, 2)
    chosen = [0]
    for _ in range(B - 1):
        chosen.append(int(torch.cdist(disc, disc[chosen]).amin(1).argmax()))
    return disc[chosen]


def arrows(gradient: Tensor) -> NDArray[np.float64]:
    """Downhill arrows (B, 2), log in length: ARROW for B |g| >= 1, none for B |g| <= 1e-3."""
    norm = gradient.norm(dim=1, keepdim=True).clamp(min=1e-300)
    length = (1 + (len(gradient) * norm).log10() / 3).clamp(0, 1)
    return (-gradient / norm * length * ARROW).numpy()


def floor_against_batch(batches: Sequence[int], curves: Mapping[str, Sequence[float]]) -> Figure:
    """Losses against the batch size, and -log B under them."""
    figure, axis = plt.subplots(figsize=(7.4, 3.7))
    for i, (name, values) in enumerate(curves.items()):
        axis.plot(batches, values, label=name, color=OKABE_ITO[i], linestyle=DASHES[i], marker=MARKERS[i], markersize=5)
    low = [-math.log(B) for B in batches]
    axis.plot(batches, low, color="black", linestyle=":", linewidth=2.5, label="floor, −log B")
    axis.fill_between(batches, low, -7.2, color="0.9", zorder=0)
    axis.set(xscale="log", xticks=batches, xticklabels=batches, ylim=(-7.2, 0.4), xlabel="batch size B", ylabel="loss")
    axis.minorticks_off()
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def who_pushes(z: Tensor, shares: Mapping[str, Tensor], *, anchor: int = 0) -> Figure:
    """Whom one point of z (B, 2) pushes: area and colour of the others are their share (B,) of its pairs' weight."""
    figure, axes = plt.subplots(1, len(shares), figsize=(10.6, 3.6), squeeze=False)
    extent = 1.1 * float(z.abs().max())
    for axis, (name, share) in zip(axes[0], shares.items(), strict=True):
        dots = axis.scatter(*z.T, s=15 + 900 * share, c=share, vmin=0, vmax=0.2, edgecolors="0.4", linewidths=0.6)
        axis.plot(*z[anchor], "*", color=RED, markersize=12)
        square(axis, name, extent)
    figure.colorbar(dots, ax=list(axes[0]), label="share of the star's push", extend="max")
    return figure


def gradient_against_scale(scales: Sequence[float], curves: Mapping[str, Sequence[float]]) -> Figure:
    """Norms of gradients against the scale of the features, on log axes; what is under 1e-12 lies on the lower edge."""
    figure, axis = plt.subplots(figsize=(7.4, 3.5))
    for i, (name, values) in enumerate(curves.items()):
        shown = np.clip(values, 1e-12, None)
        axis.plot(scales, shown, label=name, color=OKABE_ITO[i], linestyle=DASHES[i], marker=MARKERS[i], clip_on=False)
    axis.set(
        xscale="log", yscale="log", ylim=(1e-12, 1), xlabel="scale s of the features", ylabel="norm of the gradient"
    )
    axis.set(xticks=scales, xticklabels=[f"{s:g}" for s in scales])
    axis.minorticks_off()
    axis.legend(loc="center left")
    return figure


def descent_panels(arms: Mapping[str, Mapping[str, Sequence[float]]], *, rank: bool = True) -> Figure:
    """Loss, feature RMS and effective rank along a descent, one line an arm; RMS is cut off at 1,000.

    arms: for each arm `step`, `loss`, `rms` and `rank`.
    """
    panels = (("loss", "loss", "linear"), ("rms", "feature RMS", "log"), ("rank", "effective rank", "linear"))
    figure, axes = plt.subplots(1, 2 + rank, figsize=(3.55 * (2 + rank), 3.4))
    for axis, (key, label, scale) in zip(axes, panels, strict=False):
        for i, (arm, line) in enumerate(arms.items()):
            look = {"color": OKABE_ITO[i], "linestyle": DASHES[i], "marker": MARKERS[i], "label": arm}
            axis.plot(line["step"], line[key], **look, markersize=4, markevery=max(1, len(line["step"]) // 6))
        axis.set(xlabel="step", ylabel=label, yscale=scale)
    axes[0].set_ylim(-6, 0.6)
    axes[1].set_ylim(0.1, 1000)
    axes[1].legend(fontsize=9)
    return figure
