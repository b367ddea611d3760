"""Figures of samples and of what was measured on them: grids, heat-maps, the panel, and nearest training images."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from dispersive_kit.evaluation import Memorisation
from dispersive_kit.views.plots import DASHES, MARKERS, OKABE_ITO, draw_image

Cell = tuple[str, int, float]  # checkpoint, steps, CFG scale


def sample_sheet(
    images: Mapping[Cell, Tensor],
    distances: Mapping[Cell, float],
    *,
    checkpoint: str,
    steps: int,
    cfg: float,
    columns: int = 10,
    rows: int = 3,
) -> Figure:
    """Samples (N, C, H, W) of one cell of a grid of settings, one class a column, with the distance of all N above."""
    cell = (checkpoint, steps, cfg)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * 0.8, rows * 0.8 + 0.5), squeeze=False)
    for axis, image in zip(axes.flat, images[cell], strict=False):
        draw_image(axis, image)
    figure.suptitle(f"{checkpoint}, {steps} steps, CFG {cfg:g}: FD {distances[cell]:.1f}")
    return figure


def settings_heatmaps(distances: Mapping[Cell, float], floor: float) -> Figure:
    """Distance by steps (down) and CFG scale (across), one heat-map a checkpoint, on one logarithmic scale."""
    checkpoints = list(dict.fromkeys(checkpoint for checkpoint, _, _ in distances))
    steps, scales = sorted({s for _, s, _ in distances}), sorted({c for _, _, c in distances})
    size = (4.2 * len(checkpoints), 0.6 * len(steps) + 1.6)
    figure, axes = plt.subplots(1, len(checkpoints), figsize=size, sharey=True)
    low, high = np.log10(min(floor, *distances.values())), np.log10(max(distances.values()))
    for axis, checkpoint in zip(np.atleast_1d(axes), checkpoints, strict=True):
        table = np.array([[distances[checkpoint, s, c] for c in scales] for s in steps])
        sns.heatmap(
            np.log10(table), ax=axis, annot=np.vectorize("{:.1f}".format)(table), fmt="", cmap="cividis_r",
            vmin=low, vmax=high, cbar=False, xticklabels=[f"{c:g}" for c in scales], yticklabels=steps,
        )  # fmt: skip
        axis.set(title=checkpoint, xlabel="CFG scale", ylabel="")
    np.atleast_1d(axes)[0].set_ylabel("steps of Heun's method")
    figure.suptitle(f"Fréchet distance; real against real {floor:.1f}", fontsize=11)
    return figure


def panel_figure(panels: Mapping[str, Sequence[Any]], *, columns: int = 5) -> Figure:
    """One small plot a metric: value and interval of each arm, and dotted what real images get. Records of a panel."""
    first = next(iter(panels.values()))
    rows = -(-len(first) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.5 * columns, (0.3 * len(panels) + 1.1) * rows), sharey=True)
    for axis in axes.flat[len(first) :]:
        axis.set_visible(False)
    for k, axis in enumerate(axes.flat[: len(first)]):
        for i, records in enumerate(panels.values()):
            r = records[k]
            error = [[max(r.value - r.low, 0)], [max(r.high - r.value, 0)]]
            axis.errorbar(r.value, i, xerr=error, color=OKABE_ITO[i % 7], marker=MARKERS[i % 7], capsize=3)
        axis.axvline(first[k].floor, color="black", linestyle=":")
        better = {"lower": "←", "higher": "→"}.get(first[k].better, "")
        axis.set_title(f"{first[k].name.partition('[')[0]} {better}", fontsize=10)
        axis.set(yticks=range(len(panels)), yticklabels=list(panels), ylim=(len(panels) - 0.5, -0.5))
    return figure


def nearest_train_grid(generated: Tensor, train: Tensor, found: Memorisation, *, columns: int = 10) -> Figure:
    """The generated images (N, C, H, W) nearest to a training image, each above that image (T, C, H, W)."""
    order = np.argsort(found.distance)[:columns]
    figure, axes = plt.subplots(2, len(order), figsize=(0.85 * len(order) + 1, 2.2), squeeze=False)
    for column, i in zip(axes.T, order, strict=True):
        draw_image(column[0], generated[i])
        draw_image(column[1], train[found.index[i]])
        column[0].set_title(f"{found.distance[i]:.2g}", fontsize=9)
    for axis, name in zip(axes[:, 0], ("sample", "nearest\ntrain"), strict=True):
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def nearest_train_ecdf(found: Mapping[str, Memorisation]) -> Figure:
    """How far from the nearest training image: share of the images of each arm nearer than x."""
    figure, axis = plt.subplots(figsize=(7, 3.2))
    for i, (name, one) in enumerate(found.items()):
        sns.ecdfplot(x=one.distance, ax=axis, color=OKABE_ITO[i % 7], linestyle=DASHES[i % 7], label=name)
    axis.set(xlabel="distance to the nearest training image", ylabel="share of images nearer", xlim=(0, None))
    axis.legend()
    return figure
