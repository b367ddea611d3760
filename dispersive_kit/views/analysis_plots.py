"""Figures of the analysis: maps over blocks and log-SNR, spectra, similarity matrices, token maps, embeddings."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from dispersive_kit.analysis.sweep import Sweep
from dispersive_kit.analysis.umap_grid import ARMS, name_of
from dispersive_kit.views.plots import OKABE_ITO, line_look

Array = NDArray[Any]
BLUE, RED = OKABE_ITO[:2]


def level_names(levels: Sequence[float]) -> list[str]:
    return ["clean" if level == math.inf else f"{level:g}" for level in levels]


def block_maps(
    arms: Mapping[str, Tensor], levels: Sequence[float], label: str, *, difference: bool = True, fmt: str = ".3g",
    limits: tuple[float, float] | None = None, log: bool = False,
) -> Figure:  # fmt: skip
    """Heat-maps (levels, blocks) of one measure, one an arm on one colour scale; then the second less the first.

    log: colours, not numbers, are on a log scale. limits: of the colours; None: the range of all arms.
    """
    from matplotlib.colors import LogNorm, Normalize

    values = {name: value.numpy() for name, value in arms.items()}
    low, high = limits or (min(v.min() for v in values.values()), max(v.max() for v in values.values()))
    more = difference and len(values) == 2
    figure, axes = plt.subplots(1, len(values) + more, figsize=(3.6 * (len(values) + more), 3.5), squeeze=False)
    for axis, (name, value) in zip(axes[0], values.items(), strict=False):
        norm = (LogNorm if log else Normalize)(low, high)
        _heat(axis, value, levels, f"{label}\n{name}", fmt, cmap="cividis", norm=norm)
    if more:
        (first, one), (second, other) = values.items()
        apart = other - one
        bound = max(float(np.abs(apart).max()), 1e-12)
        _heat(axes[0, -1], apart, levels, f"difference\n{second} − {first}", fmt, cmap="PuOr", vmin=-bound, vmax=bound)
    return figure


def _heat(axis: Axes, value: Array, levels: Sequence[float], title: str, fmt: str, **how: Any) -> None:
    blocks = range(1, value.shape[1] + 1)
    sns.heatmap(
        value, ax=axis, annot=True, fmt=fmt, annot_kws={"fontsize": 8}, cbar=False, xticklabels=list(blocks),
        yticklabels=level_names(levels), **how,
    )  # fmt: skip
    axis.set(xlabel="block", ylabel="log-SNR", title=title)
    axis.title.set_fontsize(11)
    axis.grid(False)


def measure_curves(arms: Mapping[str, Sweep], random: Sweep, measure: str, block: int) -> Figure:
    """One measure after one block (from 1) against log-SNR: both arms, each with its Gaussian null, and random weights.

    The axis spans what the measure takes over all blocks, so that a slider over the block moves nothing else.
    """
    figure, axis = plt.subplots(figsize=(7.5, 3.8), layout="none")
    figure.subplots_adjust(left=0.11, right=0.7, bottom=0.16, top=0.9)
    x = np.arange(len(random.levels))
    everything = [random.values[measure]]
    for i, (name, one) in enumerate(arms.items()):
        axis.plot(x, one.values[measure][:, block - 1], label=name, **line_look(i))
        everything.append(one.values[measure])
        if measure in one.gaussian:
            axis.plot(x, one.gaussian[measure][:, block - 1], label=f"{name}, Gaussian", color=OKABE_ITO[i],
                      linestyle=":", marker="x", markersize=5)  # fmt: skip
            everything.append(one.gaussian[measure])
    axis.plot(x, random.values[measure][:, block - 1], label="random weights", color="0.5", linestyle="--", marker="s",
              markersize=3)  # fmt: skip
    whole = torch.stack(everything)
    low, high = float(whole.min()), float(whole.max())
    wide = low > 0 and high > 30 * low
    axis.set_yscale("log" if wide else "linear")
    margin = 0.06 * (high - low) + 1e-9
    axis.set_ylim((low / 1.2, high * 1.2) if wide else (low - margin, high + margin))
    axis.set(xlabel="log-SNR", ylabel=measure.replace("_", " "), title=f"{measure.replace('_', ' ')}, block {block}")
    axis.set_xticks(x, level_names(random.levels))
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return figure


def spectra(arms: Mapping[str, Tensor], nulls: Mapping[str, Tensor], *, title: str = "") -> Figure:
    """Covariance eigenvalues (D,) against their rank on log-log axes; right, divided by their sum.

    nulls: the same from a sample of the Gaussian with this covariance: what sampling alone does.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for axis, scaled in zip(axes, (False, True), strict=True):
        for i, (name, values) in enumerate(arms.items()):
            rank = np.arange(1, len(values) + 1)
            for kind, line in ((name, values), (f"{name}, Gaussian", nulls[name])):
                look = (
                    line_look(i, every=12)
                    if kind == name
                    else {"color": OKABE_ITO[i], "linestyle": ":", "linewidth": 3}
                )
                axis.plot(rank, line / line.sum() if scaled else line, label=kind, alpha=0.8, **look)
        share = "share of the variance" if scaled else "variance"
        axis.set(xscale="log", yscale="log", xlabel="component", ylabel=share)
    axes[0].legend(fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def similarity_matrices(features: Mapping[str, Tensor], labels: Tensor) -> Figure:
    """Cosines about the mean between images (N, D) sorted by class, one matrix a name, all on one scale."""
    order = labels.argsort(stable=True)
    figure, axes = plt.subplots(1, len(features), figsize=(3.7 * len(features), 3.6), squeeze=False)
    edges = (labels[order].diff() != 0).nonzero().flatten() + 0.5
    for axis, (name, x) in zip(axes[0], features.items(), strict=True):
        u = F.normalize(x.double() - x.double().mean(0), dim=1)[order]
        image = axis.imshow(u @ u.T, vmin=-1, vmax=1, cmap="PuOr")
        for edge in edges:
            axis.axhline(float(edge), color="black", linewidth=0.4)
            axis.axvline(float(edge), color="black", linewidth=0.4)
        axis.set(xticks=[], yticks=[], title=name)
        axis.grid(False)
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine about the mean")
    return figure


def cka_maps(matrices: Mapping[str, Tensor]) -> Figure:
    """Debiased CKA between blocks, on one scale from 0 to 1. A name "a | b" labels the rows a and the columns b."""
    figure, axes = plt.subplots(1, len(matrices), figsize=(3.5 * len(matrices), 3.4), squeeze=False)
    for axis, (name, matrix) in zip(axes[0], matrices.items(), strict=True):
        rows, _, columns = name.partition(" | ")
        ticks = [list(range(1, n + 1)) for n in matrix.shape]
        sns.heatmap(matrix.numpy(), ax=axis, vmin=0, vmax=1, cmap="cividis", annot=True, fmt=".2f", cbar=False,
                    yticklabels=ticks[0], xticklabels=ticks[1])  # fmt: skip
        axis.set(ylabel=f"block, {rows}", xlabel=f"block, {columns or rows}")
        axis.grid(False)
    return figure


def pull_panels(arms: Mapping[str, Any]) -> Figure:
    """Ratio of the two gradients by block and part of t (log axis), and the cosine between them. Values: `Pull`."""
    figure, axes = plt.subplots(2, len(arms), figsize=(4.6 * len(arms), 6), squeeze=False, sharex=True, sharey="row")
    for column, (name, pull) in zip(axes.T, arms.items(), strict=True):
        bins, blocks = pull.ratio.shape
        for k in range(bins):
            part = f"t in {k / bins:g} to {(k + 1) / bins:g}"
            column[0].plot(range(1, blocks + 1), pull.ratio[k].clamp(min=1e-12), label=part, **line_look(k))
            column[1].plot(range(1, blocks + 1), pull.cosine[k], **line_look(k))
        column[1].axhline(0, color="black", linewidth=0.8)
        column[0].set(yscale="log", title=name)
        column[1].set(xlabel="block", xticks=range(1, blocks + 1), ylim=(-1, 1))
    axes[0, 0].set(ylabel="gradient, dispersive / denoising")
    axes[1, 0].set(ylabel="cosine between them")
    lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=4, fontsize=9)  # in a panel it would cover a line
    return figure


def token_grid(images: Tensor, maps: Mapping[str, Array]) -> Figure:
    """A row of uint8 images (B, C, H, W) and below it one row of token maps (B, G, G, 3) for each name."""
    rows = {"image": images.permute(0, 2, 3, 1).numpy(), **maps}
    figure, axes = plt.subplots(len(rows), len(images), figsize=(1.1 * len(images) + 0.8, 1.12 * len(rows)))
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, cmap="gray")  # for one channel; three are colours
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return figure


def embeddings(panels: Mapping[str, Array], labels: Tensor, trust: Mapping[str, float], *, columns: int = 3) -> Figure:
    """Pictures (N, 2) with the class by colour and digit, and how far each may be trusted under it.

    Each is centred and has axes of its own size, without ticks: areas and distances carry no dispersion meaning.
    """
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.5 * columns, 3.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, points) in zip(axes.flat, panels.items(), strict=False):
        _classes(axis, points, labels)
        axis.set(title=name, xlabel=f"trustworthiness {trust[name]:.2f}")
    return figure


def _classes(axis: Axes, points: Array, labels: Tensor) -> None:
    colours = sns.color_palette("husl", int(labels.max()) + 1)
    for k in labels.unique():
        own = points[(labels == k).numpy()]
        axis.scatter(own[:, 0], own[:, 1], s=5, color=colours[int(k)], alpha=0.7, linewidths=0)
        axis.annotate(str(int(k)), np.median(own, axis=0), ha="center", va="center", weight="bold")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)


def probe_maps(tables: Mapping[str, Mapping[str, Tensor]], levels: Sequence[float], probe: str) -> Figure:
    """Validation accuracy (levels, blocks) of one kind of probe for each arm: tables[probe][arm]."""
    return block_maps(tables[probe], levels, f"accuracy, {probe}", fmt=".2f", limits=(0.0, 1.0))


def umap_pair(
    grid: Mapping[str, Array],
    trust: Mapping[str, float],
    labels: Tensor,
    *,
    neighbours: int,
    min_dist: float,
    seed: int,
    arms: Sequence[str] = tuple(ARMS),
) -> Figure:
    """The arms' UMAPs of a shipped grid at one setting, side by side."""
    names = {arm: name_of(arm, neighbours, min_dist, seed) for arm in arms}
    panels = {arm: grid[name] for arm, name in names.items()}
    return embeddings(panels, labels, {arm: trust[name] for arm, name in names.items()}, columns=2)


def intervals(results: Mapping[str, Any], *, chance: float) -> Figure:
    """Test accuracies with their intervals, one line each, and chance as a dotted line. Values: probes' `Result`."""
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(results) + 1.2))
    for i, one in enumerate(results.values()):
        error = [[one.accuracy - one.low], [one.high - one.accuracy]]
        axis.errorbar(one.accuracy, i, xerr=error, capsize=4, **{**line_look(i), "linestyle": "none", "markersize": 7})
    axis.axvline(chance, color="black", linestyle=":")
    axis.set(
        xlim=(0, 1), yticks=range(len(results)), yticklabels=list(results), xlabel="test accuracy (dotted: chance)"
    )
    axis.invert_yaxis()
    return figure


def stage_panel(stages: Mapping[int, Array], step: int, labels: Tensor, trust: float) -> Figure:
    """One stage (N, 2) of an AlignedUMAP, on the axes of all stages, and how far it may be trusted."""
    points = np.concatenate(list(stages.values()))
    low, high = points.min(0) - 0.5, points.max(0) + 0.5
    figure, axis = plt.subplots(figsize=(5, 4.6))
    _classes(axis, stages[step], labels)
    axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), title=f"after {step} steps",
             xlabel=f"trustworthiness {trust:.2f}")  # fmt: skip
    return figure
