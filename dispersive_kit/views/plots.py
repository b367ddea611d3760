"""Figures. Each function returns a matplotlib Figure and draws nothing on the screen; `show` puts it on the page.

One style for all: Okabe-Ito colours with a marker or line style beside each, cividis for images of numbers.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray
from torch import Tensor

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "image.cmap": "cividis",
    "legend.frameon": False,
    "axes.prop_cycle": plt.cycler(color=OKABE_ITO),
}


def style() -> None:
    """Set the kit's style for all figures of this process."""
    plt.rcParams.update(STYLE)


def figure_html(figure: Figure | str, alt: str, caption: str = "") -> str:
    """The figure, or SVG text, as one HTML element with its alternative text inside: it survives every export."""
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    alt = html.escape(alt, quote=True)
    if isinstance(figure, str):
        return f'<figure style="margin:0" aria-label="{alt}">{figure}{text}</figure>'
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{alt}" style="max-width:100%">'
    return f'<figure style="margin:0">{image}{text}</figure>'


def show(figure: Figure | str, alt: str, caption: str = "") -> None:
    """Display a figure, or SVG text, in a notebook, with alternative text that says what there is to see."""
    from IPython.display import HTML, display

    display(HTML(figure_html(figure, alt, caption)))
    if isinstance(figure, Figure):
        plt.close(figure)


def line_look(i: int, *, every: int | None = None) -> dict[str, Any]:
    look: dict[str, Any] = {"color": OKABE_ITO[i % 7], "linestyle": DASHES[i % 7], "marker": MARKERS[i % 7]}
    return {**look, "markersize": 4, **({"markevery": every} if every else {})}


def saturation_panel(metrics: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Gap to the floor, feature RMS and gradient ratio against the step, one line an arm.

    Args:
        metrics: for each arm the lines of its metrics.jsonl (those without `gap` are passed over).
    """
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    panels = (
        ("gap", "loss minus floor", "symlog"),
        ("feature_rms", "feature RMS", "linear"),
        ("gradient_ratio", "gradient, dispersive / denoising", "log"),
    )
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        for i, (arm, lines) in enumerate(metrics.items()):
            points = [(line["step"], line[key]) for line in lines if key in line]
            steps, values = (np.array(column) for column in zip(*points, strict=True))
            axis.plot(steps, values, label=arm, **line_look(i, every=max(1, len(points) // 8)))
        axis.set(xlabel="training step", ylabel=label)
        axis.set_yscale(scale, **({"linthresh": 1e-3} if scale == "symlog" else {}))
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(bottom=1e-8)  # below it nothing is pulled at all
    axes[0].legend()
    return figure


def same_noise_grid(
    rows: Mapping[str, Tensor], *, columns: int = 10, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """One row of images an arm; a column is one noise and one label. Rows: uint8 (N, C, H, W)."""
    figure = figure or plt.figure(figsize=(columns, 1.02 * len(rows)))
    axes = figure.subplots(
        len(rows),
        columns,
        squeeze=False,
        gridspec_kw={"wspace": 0.05, "hspace": 0.05},
    )
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images[:columns], strict=True):
            draw_image(axis, image)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def draw_image(axis: Axes, image: Tensor) -> None:
    """One uint8 image (C, H, W), without axes."""
    array = image.permute(1, 2, 0).numpy()
    axis.imshow(array.squeeze(-1) if array.shape[-1] == 1 else array, cmap="gray", vmin=0, vmax=255)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def pairwise_distances(z: Tensor) -> NDArray[np.float64]:
    """|z_i - z_j|^2 / dim over the pairs i < j of flattened features (B, ...), in float64."""
    from scipy.spatial.distance import pdist

    flat = z.detach().flatten(1).double().numpy()
    return pdist(flat, "sqeuclidean") / flat.shape[1]


def pairwise_histogram(features: Mapping[str, Tensor]) -> Figure:
    """How far apart the features of a batch lie: histograms and ECDFs, raw and after division by the feature RMS.

    A regulariser that only inflates the norm moves the upper row and leaves the lower one.
    """
    raw = {name: pairwise_distances(z) for name, z in features.items()}
    scaled = {name: raw[name] / float(z.double().square().mean()) for name, z in features.items()}
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.6))
    labels = ("squared distance / dim (log axis)", "the same / mean square of the features")
    for row, distances, label, log in zip(axes, (raw, scaled), labels, (True, False), strict=True):
        for i, (name, values) in enumerate(distances.items()):
            color, dash = OKABE_ITO[i % 7], DASHES[i % 7]
            sns.histplot(
                x=values, ax=row[0], color=color, linestyle=dash, element="step", fill=False, stat="density",
                bins=60, label=name, log_scale=log,
            )  # fmt: skip
            sns.ecdfplot(x=values, ax=row[1], log_scale=log, color=color, linestyle=dash, label=name)
        row[0].set(xlabel=label, ylabel="density")
        row[1].set(xlabel=label, ylabel="share of pairs below")
    axes[0, 1].legend(loc="upper left")  # where a cumulative curve is low: it covers none
    return figure


def distance_panel(
    records: Sequence[Any], names: Sequence[str], *, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Values with their intervals against the real-against-real floor, on a log axis. Records as of evaluation."""
    figure = figure or plt.figure(figsize=(8, 0.6 * len(records) + 1.4))
    axis = figure.subplots()
    for i, record in enumerate(records):
        low, high = max(record.value - record.low, 0), max(record.high - record.value, 0)
        axis.errorbar(record.value, i, xerr=[[low], [high]], color=OKABE_ITO[i % 7], marker=MARKERS[i % 7], capsize=4)
        axis.annotate(f"{record.value:.1f}", (record.value, i), xytext=(0, 8), textcoords="offset points", ha="center")
    axis.axvline(records[0].floor, color="black", linestyle=":")
    axis.annotate("real against real", (records[0].floor, -0.6), xytext=(4, 0), textcoords="offset points", fontsize=9)
    axis.set(
        xscale="log", yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.8),
        xlabel=f"{records[0].name.partition(',')[0]}] (log axis, lower is better)",
    )  # fmt: skip
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    return figure


def summary(
    images: Mapping[str, Tensor], records: Mapping[str, Any], metrics: Mapping[str, Sequence[Mapping[str, float]]]
) -> Figure:
    """The comparison on one page: same-noise images above, distances and the size of the features below."""
    figure = plt.figure(figsize=(10, 1.02 * len(images) + 3.2))
    grid = figure.add_gridspec(2, 2, height_ratios=(1.02 * len(images), 3.2), width_ratios=(3, 2))
    same_noise_grid(images, figure=figure.add_subfigure(grid[0, :]))
    distance_panel(list(records.values()), list(records), figure=figure.add_subfigure(grid[1, 0]))
    axis = figure.add_subfigure(grid[1, 1]).subplots()
    for i, (arm, lines) in enumerate(metrics.items()):
        steps, rms = zip(*((line["step"], line["feature_rms"]) for line in lines if "feature_rms" in line), strict=True)
        axis.plot(steps, rms, label=arm, **line_look(i, every=4))
    axis.set(xlabel="training step", ylabel="feature RMS of the tapped block", ylim=(0, None))
    axis.legend()
    return figure
