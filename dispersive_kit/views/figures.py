"""Figures. Each function returns a matplotlib Figure and draws nothing on the screen; `show` puts it on the page.

One style for all: Okabe-Ito colours with a marker or a dash each, cividis for tables of numbers, legends outside.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.scale import SymmetricalLogScale
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from torch import Tensor

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLUE, RED, GREEN, GREY = *OKABE_ITO[:3], "0.55"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
LINES: list[dict[str, Any]] = [{"color": c, "linestyle": dash} for c, dash in zip(OKABE_ITO, DASHES, strict=True)]
POINTS: list[dict[str, Any]] = [{"color": c, "marker": mark} for c, mark in zip(OKABE_ITO, MARKERS, strict=True)]
LOOKS: dict[str, dict[str, Any]] = {  # of the four verdicts
    "better": {"color": GREEN, "marker": "^"},
    "equivalent": {"color": BLUE, "marker": "o"},
    "worse": {"color": RED, "marker": "v"},
    "inconclusive": {"color": "#666666", "marker": "D"},
}
MEASURES = {"frechet": "Fréchet distance", "held_out": "held-out denoising loss", "probe": "probe accuracy",
            "copies": "share of copies"}  # fmt: skip

Interval = tuple[float, float, float]  # low, value, high


def style() -> None:
    """Set the kit's style for all figures of this process."""
    plt.rcParams.update({
        "figure.dpi": 110, "figure.constrained_layout.use": True, "font.size": 11, "axes.titlesize": 11,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
        "axes.prop_cycle": plt.cycler(color=OKABE_ITO), "image.cmap": "cividis", "legend.frameon": False,
        "legend.fontsize": 9,
    })  # fmt: skip


def figure_html(figure: Figure, alt: str, caption: str = "") -> str:
    """Close the figure; returns it as one HTML element with the alternative text in it, which every export keeps."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    data, alt = base64.b64encode(buffer.getvalue()).decode(), html.escape(alt, quote=True)
    image = f'<img src="data:image/png;base64,{data}" alt="{alt}" style="max-width:100%">'
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure style="margin:0">{image}{text}</figure>'


def show(figure: Figure, alt: str, caption: str = "") -> None:
    """Display a figure in a notebook, with alternative text that says what there is to see, and close it."""
    from IPython.display import HTML, display

    display(HTML(figure_html(figure, alt, caption)))


def _panels(n: int, columns: int | None, width: float, height: float, **how: Any) -> tuple[Figure, list[Axes]]:
    """n panels of a size in inches, `columns` in a row (none: all)."""
    columns = columns or n
    rows = math.ceil(n / columns)
    size = (width * columns, height * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **how)
    for spare in grid.flat[n:]:
        spare.set_visible(False)
    return figure, list(grid.flat[:n])


def _legend(figure: Figure) -> None:
    """One legend for all panels: on top of several, at the right of one."""
    handles = {name: line for axis in figure.axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    if len(handles) > 1:
        rows = math.ceil(len(handles) / 5)
        above: dict[str, Any] = {"loc": "outside upper center", "ncols": math.ceil(len(handles) / rows)}
        place = above if len(figure.axes) > 1 else {"loc": "outside right upper"}
        figure.legend(list(handles.values()), list(handles), **place)


def curves(
    panels: Mapping[str, Mapping[str, Any]], *, nulls: Mapping[str, Mapping[str, Any]] | None = None,
    each: Mapping[str, Mapping[str, Any]] | None = None, xlabel: str = "training step", columns: int | None = None,
    size: tuple[float, float] = (3.8, 3.5), **axes: Any,
) -> Figure:  # fmt: skip
    """A line for each arm, in a panel for each y label.

    panels: y label -> arm -> (x, y). A number in place of (x, y) is a level: dotted, across the panel.
    nulls: y label -> arm -> (x, y) of its Gaussian null: dotted, in the colour of the arm.
    each: y label -> what `Axes.set` takes, for one panel; `axes` are for all of them.
    columns: panels in a row; none: all. size: of a panel, in inches.
    """
    figure, drawn = _panels(len(panels), columns, *size)
    arms = list(dict.fromkeys(arm for lines in panels.values() for arm in lines if isinstance(lines[arm], tuple)))
    for axis, (label, lines) in zip(drawn, panels.items(), strict=True):
        for arm, line in lines.items():
            if arm not in arms:
                axis.axhline(line, color="black", linestyle=":", label=arm)
                continue
            i, every = arms.index(arm), max(1, len(line[0]) // 8)
            marks: dict[str, Any] = {"marker": MARKERS[i % 7], "markevery": (i * every // 7, every), "markersize": 5}
            axis.plot(*line, label=arm, **marks, **LINES[i % 7])
        for arm, line in (nulls or {}).get(label, {}).items():
            axis.plot(*line, ":", color=OKABE_ITO[arms.index(arm)], linewidth=3, label=f"{arm}, Gaussian", alpha=0.7)
        axis.set(**{"xlabel": xlabel, "ylabel": label, **axes, **(each or {}).get(label, {})})
        low, high = axis.get_ylim()
        if axis.get_yscale() == "log" and high < 300 * low:  # labels at powers of ten only would be too few
            axis.yaxis.set_minor_formatter("{x:g}")
            _log_if_wide(axis, "y", (low, high))
        if "xticks" in axes:
            axis.xaxis.set_minor_locator(NullLocator())
    _legend(figure)
    return figure


def logged(metrics: Mapping[str, Sequence[Mapping[str, float]]], key: str) -> dict[str, Any]:
    """(steps, values) of each arm, from those lines of its metrics.jsonl that have the key."""
    found = {arm: [(line["step"], line[key]) for line in lines if key in line] for arm, lines in metrics.items()}
    return {arm: tuple(zip(*points, strict=True)) for arm, points in found.items() if points}


def saturation(metrics: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Gap to the floor, feature RMS and gradient ratio against the step, from the lines of each arm's metrics.jsonl."""
    panels: dict[str, tuple[str, dict[str, Any]]] = {
        "loss minus floor": ("gap", {"yscale": SymmetricalLogScale(None, linthresh=1e-3), "ylim": (0, None)}),
        "feature RMS": ("feature_rms", {"ylim": (0, None)}),
        "gradient, dispersive / denoising": ("gradient_ratio", {"yscale": "log", "ylim": (1e-8, None)}),
    }
    lines = {label: logged(metrics, key) for label, (key, _) in panels.items()}
    return curves(lines, each={label: scale for label, (_, scale) in panels.items()})


def heatmaps(
    tables: Mapping[str, Any], *, rows: Sequence[Any] | None = None, columns: Sequence[Any] | None = None,
    xlabel: str = "block", ylabel: str = "block", fmt: str = ".2f", limits: tuple[float, float] | None = None,
    log: bool = False, cmap: str = "cividis", difference: bool = False,
) -> Figure:  # fmt: skip
    """Tables (rows, columns) as colours and numbers, one panel each, on one colour scale.

    rows, columns: names; none: counted from 1. fmt: of the numbers; empty: a colour bar in their place.
    limits: of the colours, on a log scale if `log`; none: the range of all tables.
    difference: beside two tables, the second less the first, on a scale of its own.
    """
    values = {name: np.asarray(table) for name, table in tables.items()}
    low, high = limits or (min(v.min() for v in values.values()), max(v.max() for v in values.values()))
    colours = {"cmap": cmap, "norm": (LogNorm if log else Normalize)(low, high)}
    panels = [(name, value, colours) for name, value in values.items()]
    if difference and len(values) == 2:
        (first, one), (second, other) = values.items()
        bound = max(float(np.abs(other - one).max()), 1e-12)
        panels.append((f"{second} − {first}", other - one, {"cmap": "PuOr", "norm": Normalize(-bound, bound)}))
    figure, axes = _panels(len(panels), None, 3.6, 3.6)
    for axis, (title, value, how) in zip(axes, panels, strict=True):
        names = zip((rows, columns), value.shape, strict=True)
        down, across = (list(given or range(1, n + 1)) if fmt else False for given, n in names)
        numbers: dict[str, Any] = {"annot": bool(fmt), "fmt": fmt, "annot_kws": {"fontsize": 8}, "cbar": False}
        sns.heatmap(value, ax=axis, yticklabels=down, xticklabels=across, **numbers, **how)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.tick_params(axis="y", rotation=0)
        axis.grid(False)
    if not fmt:
        figure.colorbar(axes[0].collections[0], ax=axes, shrink=0.8)
    return figure


def image_grid(rows: Mapping[str, Any], *, columns: int = 10, titles: Sequence[str] = (), size: float = 1) -> Figure:
    """A row of images under each name, and a title above each column.

    rows: uint8 images (C, H, W), or maps of numbers (H, W), whose colours go from -3 to 3.
    size: of an image, in inches.
    """
    beside = 0.09 * max(len(line) for name in rows for line in name.split("\n"))  # inches for the names
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(size * columns + beside, 1.03 * size * len(rows) + 0.25 * bool(titles)),
        squeeze=False, layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0),
    )  # fmt: skip
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images[:columns], strict=True):
            if image.ndim == 2:
                axis.imshow(np.asarray(image), vmin=-3, vmax=3)
            else:
                axis.imshow(np.asarray(image.permute(1, 2, 0)), cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=10)
    return figure


def scatter(
    panels: Mapping[str, Any], *, labels: Tensor | None = None, notes: Mapping[str, str] | None = None,
    extent: float | None = 2.8, size: float = 2.8,
) -> Figure:  # fmt: skip
    """Points (n, 2), a panel for each name, with a note below it.

    labels: classes (n,), by colour and numeral. extent: half the side of every panel; none: axes of its own and no
    ticks, where distances mean nothing.
    """
    figure, axes = _panels(len(panels), None, size, size + 0.2)
    for axis, (name, points) in zip(axes, panels.items(), strict=True):
        x = np.asarray(points)
        if labels is None:
            axis.plot(*x.T, ".", color=BLUE, markersize=2, alpha=0.5)
        else:
            classes = np.asarray(labels)
            colours = sns.color_palette("husl", int(classes.max()) + 1)
            for k in np.unique(classes):
                own = x[classes == k]
                axis.scatter(own[:, 0], own[:, 1], s=5, color=colours[k], alpha=0.7, linewidths=0)
                axis.annotate(str(k), np.median(own, axis=0), ha="center", va="center", weight="bold")
        axis.set(title=name, xlabel=(notes or {}).get(name, ""))
        if extent:
            axis.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
        if not extent or labels is not None:
            axis.set(xticks=[], yticks=[])
    return figure


def distribution(samples: Mapping[str, Any], kind: Literal["hist", "ecdf", "kde"], **axes: Any) -> Figure:
    """How samples (n,) are distributed, a line for each name; `axes` is what `Axes.set` takes."""
    figure, (axis,) = _panels(1, None, 7.4, 3.4)
    _distribution(axis, samples, kind)
    axis.set(**axes)
    _legend(figure)
    return figure


def _distribution(axis: Axes, samples: Mapping[str, Any], kind: str, *, log: bool = False) -> None:
    draw = {"hist": sns.histplot, "ecdf": sns.ecdfplot, "kde": sns.kdeplot}[kind]
    how: dict[str, Any] = {"hist": {"element": "step", "fill": False, "stat": "density", "bins": 60}, "kde": {"cut": 0}}
    for i, (name, values) in enumerate(samples.items()):
        draw(x=np.asarray(values), ax=axis, label=name, log_scale=log, **how.get(kind, {}), **LINES[i % 7])


def pairwise_distances(z: Tensor) -> NDArray[np.float64]:
    """|z_i - z_j|^2 / dim over the pairs i < j of flattened features (B, ...), in float64."""
    flat = z.detach().flatten(1).double().numpy()
    return pdist(flat, "sqeuclidean") / flat.shape[1]


def pairwise_histogram(features: Mapping[str, Tensor]) -> Figure:
    """Distances of pairs: raw, and divided by the features' mean square, so that a larger norm changes nothing."""
    raw = {name: pairwise_distances(z) for name, z in features.items()}
    scaled = {name: raw[name] / float(z.double().square().mean()) for name, z in features.items()}
    figure, axes = _panels(4, 2, 5, 2.9)
    for k, axis in enumerate(axes):
        _distribution(axis, raw if k < 2 else scaled, ("hist", "ecdf")[k % 2], log=k < 2)
        label = "squared distance / dim (log axis)" if k < 2 else "the same / mean square of the features"
        axis.set(xlabel=label, ylabel=("density", "share of pairs below")[k % 2])
    _legend(figure)
    return figure


def forest(
    panels: Mapping[str, Mapping[str, Interval]], *, levels: Mapping[str, float] | None = None, fmt: str = "",
    columns: int | None = None, width: float = 8, **axes: Any,
) -> Figure:  # fmt: skip
    """Values with their intervals, a line for each name, in a panel for each x label.

    levels: x label -> where the panel has a dotted line. fmt: of the values beside the lines; empty: none.
    """
    lines = max(len(rows) for rows in panels.values())
    figure, drawn = _panels(len(panels), columns, width, 0.36 * lines + 1, sharey=True)
    for axis, (label, rows) in zip(drawn, panels.items(), strict=True):
        notes = [format(value, fmt) if fmt else "" for _, value, _ in rows.values()]
        _intervals(axis, rows, notes, [POINTS[i % 7] for i in range(len(rows))])
        if levels:
            axis.axvline(levels[label], color="black", linestyle=":")
        axis.set(xlabel=label, **axes)
        if axes.get("xscale") == "log":
            _log_if_wide(axis, "x", axis.dataLim.intervalx)
    return figure


def _intervals(axis: Axes, rows: Mapping[str, Interval], notes: Sequence[str], looks: Sequence[Any]) -> None:
    """A line for each name, from above: the interval, and its note at the right of the axis."""
    beside = axis.get_yaxis_transform()
    for i, ((low, value, high), note, look) in enumerate(zip(rows.values(), notes, looks, strict=True)):
        around = [[max(value - low, 0)], [max(high - value, 0)]]  # an interval of a bootstrap may miss its value
        axis.errorbar(value, i, xerr=around, capsize=4, **look)
        axis.annotate(note, (1.01, i), xycoords=beside, va="center", fontsize=9, annotation_clip=False)
    axis.set(yticks=range(len(rows)), yticklabels=list(rows), ylim=(max(len(rows), 1) - 0.5, -0.5))


def _log_if_wide(axis: Axes, which: Literal["x", "y"], ends: Sequence[float]) -> None:
    """A log axis with plain numbers, where the ends differ by more than a factor of two."""
    if ends[1] < 2 * ends[0]:
        return
    axis.set(**{f"{which}scale": "log"})
    side = axis.xaxis if which == "x" else axis.yaxis
    subs = (1, 1.5, 2, 3, 5, 7) if ends[1] < 30 * ends[0] else (1, 2, 5) if ends[1] < 300 * ends[0] else (1, 3)
    side.set_major_locator(LogLocator(subs=subs))
    side.set_major_formatter("{x:g}")
    side.set_minor_formatter(NullFormatter())


def compared(v: Mapping[str, Any]) -> str:
    """The arm of a verdict, and the other arm if it is not the reference: "paper", or "paper / placebo"."""
    return f"{v['arm']} / {v['against']}" if "against" in v else v["arm"]


def slope_graph(results: Mapping[str, Any], measure: str = "frechet") -> Figure:
    """A column for each condition. Above: one line for each seed over the arms, the reference first, others by value; a
    gap is a crashed run. Below: each verdict's ratio with its 95 % interval, and the margin that counts as equal.
    """
    conditions = list(dict.fromkeys(row["condition"] for row in results["summary"]))
    first = [row for row in results["summary"] if row["condition"] == conditions[0]]
    means = {row["arm"]: row["values"].get(measure, {}).get("mean", math.inf) for row in first}  # all crashed: last
    arms = sorted(means, key=lambda arm: (arm != results["reference"], means[arm]))
    verdicts = [v for v in results["verdicts"] if v["measure"] == measure]
    none = {"word": ""} | dict.fromkeys(("low", "mean", "high"), math.nan)
    judged = list(dict.fromkeys(compared(v) for v in sorted(verdicts, key=lambda v: arms.index(v["arm"]))))
    heights = [3.2, 0.9 + 0.27 * len(judged)] if judged else [3.2]
    figure, axes = plt.subplots(
        len(heights), len(conditions), figsize=(2.6 + max(3.6, 0.62 * len(arms)) * len(conditions), sum(heights)),
        squeeze=False, height_ratios=heights, sharey="row", layout="constrained",
    )  # fmt: skip
    for column, condition in zip(axes.T, conditions, strict=True):
        _slopes(column[0], results, condition, arms, measure)
        column[0].set_title(condition if len(conditions) > 1 else "")
        if judged:
            found = {compared(v): v for v in verdicts if v["condition"] == condition}
            _ratios(column[1], {name: found.get(name, none) for name in judged})
            for margin in {v["margin"] for v in found.values()}:
                column[1].axvspan(math.exp(-margin), math.exp(margin), color=BLUE, alpha=0.06, lw=0)
            column[1].set_xlabel(f"ratio to {results['reference']}")
    name, _, scale = measure.partition(" cfg ")  # as "frechet cfg 2"
    axes[0, 0].set_ylabel(MEASURES.get(name, name) + (f" at CFG scale {scale}" if scale else ""))
    return figure


def _slopes(axis: Axes, results: Mapping[str, Any], condition: str, arms: list[str], measure: str) -> None:
    runs = [run for run in results["runs"] if run["condition"] == condition]
    for i, seed in enumerate(sorted({run["seed"] for run in runs})):
        own = {run["arm"]: run["values"].get(measure, math.nan) for run in runs if run["seed"] == seed}
        axis.plot(range(len(arms)), [own[arm] for arm in arms], lw=1, ms=4, **POINTS[i % 7])
    slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axis.set(xticks=range(len(arms)), xlim=(-0.3, len(arms) - 0.7))
    axis.set_xticklabels(arms, **(slanted if len(arms) > 5 else {}))
    if measure.startswith("frechet") and "floor_value" in results["record"]:
        axis.axhline(results["record"]["floor_value"], color="black", linestyle=":", lw=1)
    _log_if_wide(axis, "y", axis.dataLim.intervaly)


def _ratios(axis: Axes, verdicts: Mapping[str, Mapping[str, Any]]) -> None:
    """Ratios with their intervals, each in the colour and with the marker of its word."""
    rows = {name: tuple(np.exp([v["low"], v["mean"], v["high"]])) for name, v in verdicts.items()}
    words = [v["word"] for v in verdicts.values()]
    _intervals(axis, rows, words, [LOOKS.get(word, {}) for word in words])
    axis.axvline(1, color="black", linestyle=":", lw=1)
    _log_if_wide(axis, "x", axis.dataLim.intervalx)
