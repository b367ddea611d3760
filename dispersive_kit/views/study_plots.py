"""Figures of a study: pairs as lines, and beside them the interval of the difference. Results as in results.json."""

import math
from collections.abc import Mapping, Sequence
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


WORDS = ("better", "equivalent", "worse", "inconclusive")  # a colour and a marker each


def verdict_forest(rows: Sequence[Mapping[str, Any]], show: str = "all") -> Figure:
    """Every verdict of several studies as ratio with interval, one line each; show: all of them, or those of one word.

    Rows: verdicts as in results.json, each with its `study`. All states have one axis and one height.
    """
    figure, axis = plt.subplots(figsize=(10, 1.4 + 0.42 * len(rows)))
    shown = [row for row in rows if show in ("all", row["word"])]
    for i, row in enumerate(shown):
        low, mid, high = np.exp([row["low"], row["mean"], row["high"]])
        look: dict[str, Any] = {
            "color": OKABE_ITO[WORDS.index(row["word"])],
            "marker": MARKERS[WORDS.index(row["word"])],
        }
        axis.errorbar(mid, i, xerr=[[mid - low], [high - mid]], capsize=4, **look)
        axis.annotate(row["word"], (high, i), xytext=(8, -4), textcoords="offset points", fontsize=9)
    labels = [f"{row['study']}: {row['arm']}, {row['measure']}" for row in shown]
    lows, highs = (np.exp([row[end] for row in rows]) for end in ("low", "high"))
    axis.axvline(1, color="black", linestyle=":", lw=1)
    axis.set(
        yticks=range(len(shown)), yticklabels=labels, ylim=(len(rows) - 0.4, -0.6), xscale="log",
        xlim=(0.9 * lows.min(), 1.5 * highs.max()), xlabel="ratio to the reference arm (log axis)",
    )  # fmt: skip
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    return figure


def single_seeds(results: Mapping[str, Any], arm: str, measure: str = "frechet") -> Figure:
    """What each seed alone would have told of an arm: its ratio to the reference, and the interval of all together."""
    values = {(run["arm"], run["seed"]): run["values"][measure] for run in results["runs"] if measure in run["values"]}
    seeds = sorted({seed for name, seed in values if name == arm})
    verdict = next(v for v in results["verdicts"] if (v["arm"], v["measure"]) == (arm, measure))
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.3 * len(seeds)))
    for i, seed in enumerate(seeds):
        axis.plot(values[arm, seed] / values[results["reference"], seed], i, "o", color=OKABE_ITO[0])
    low, mid, high = np.exp([verdict["low"], verdict["mean"], verdict["high"]])
    axis.errorbar(mid, len(seeds), xerr=[[mid - low], [high - mid]], color="black", marker="s", capsize=4)
    axis.axvline(1, color="black", linestyle=":", lw=1)
    names = [*(f"seed {seed} alone" for seed in seeds), "all, 95 %"]
    axis.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlabel=f"ratio, {arm}")
    return figure
