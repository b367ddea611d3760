"""Figures of a study: pairs as lines, and beside them the interval of the difference. Results as in results.json."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from dispersive_kit.views.plots import MARKERS, OKABE_ITO

LABELS = {"frechet": "Fréchet distance", "held_out": "held-out denoising loss", "probe": "probe accuracy"}


def slope_graph(results: Mapping[str, Any], measure: str = "frechet") -> Figure:
    """A column for each condition: above, one line a seed through all arms; below, each arm's ratio to the reference
    with its 95 % interval, and the margin within which it counts as equal. Crashed runs leave a gap in their line.
    """
    conditions = list(dict.fromkeys(row["condition"] for row in results["summary"]))
    arms = list(dict.fromkeys(row["arm"] for row in results["summary"]))
    figure, axes = plt.subplots(
        2, len(conditions), figsize=(1.6 + 3.9 * len(conditions), 5.6), squeeze=False,
        height_ratios=(3, 0.9 + 0.35 * len(arms)), sharey="row",
    )  # fmt: skip
    for (above, below), condition in zip(axes.T, conditions, strict=True):
        _slopes(above, results, condition, arms, measure)
        _differences(below, results, condition, arms, measure)
        above.set_title(condition)
    axes[0, 0].set_ylabel(LABELS.get(measure, measure))
    return figure


def _slopes(axis: Axes, results: Mapping[str, Any], condition: str, arms: list[str], measure: str) -> None:
    runs = [run for run in results["runs"] if run["condition"] == condition]
    for i, seed in enumerate(sorted({run["seed"] for run in runs})):
        own = {run["arm"]: run["values"].get(measure, math.nan) for run in runs if run["seed"] == seed}
        look: dict[str, Any] = {"color": OKABE_ITO[i % 7], "marker": MARKERS[i % 7]}
        axis.plot(range(len(arms)), [own[arm] for arm in arms], lw=1, ms=4, label=f"seed {seed}", **look)
    axis.set(xticks=range(len(arms)), xticklabels=arms, xlim=(-0.3, len(arms) - 0.7))
    _log_if_wide(axis, "y")
    if measure.startswith("frechet") and "floor_value" in results["record"]:
        axis.axhline(results["record"]["floor_value"], color="black", linestyle=":", lw=1)


def _differences(axis: Axes, results: Mapping[str, Any], condition: str, arms: list[str], measure: str) -> None:
    others = [arm for arm in arms if arm != results["reference"]]
    known = {v["arm"]: v for v in results["verdicts"] if (v["condition"], v["measure"]) == (condition, measure)}
    for i, arm in enumerate(others):
        if arm in known:
            v = known[arm]
            low, mid, high = np.exp([v["low"], v["mean"], v["high"]])
            axis.errorbar(mid, i, xerr=[[mid - low], [high - mid]], color="black", marker="o", capsize=4)
            axis.annotate(v["word"], (mid, i), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9)
            axis.axvspan(math.exp(-v["margin"]), math.exp(v["margin"]), color="#0072B2", alpha=0.06, lw=0)
    axis.axvline(1, color="black", linestyle=":", lw=1)
    axis.set(
        yticks=range(len(others)), yticklabels=others, ylim=(len(others) - 0.5, -0.8),
        xlabel=f"ratio to {results['reference']}",
    )  # fmt: skip
    _log_if_wide(axis, "x")


def _log_if_wide(axis: Axes, which: Literal["x", "y"]) -> None:
    """A log axis with plain numbers where the values differ by more than a factor of two."""
    low, high = axis.dataLim.intervalx if which == "x" else axis.dataLim.intervaly
    if high < 2 * low:
        return
    axis.set(**{f"{which}scale": "log"})
    side = axis.xaxis if which == "x" else axis.yaxis
    side.set_major_locator(LogLocator(subs=(1, 2, 5)))
    side.set_major_formatter("{x:g}")
    side.set_minor_formatter("")
