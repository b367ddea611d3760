"""Figures of a study: pairs as lines, and beside them the interval of the difference. Results as in results.json."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from dispersive_kit.views.plots import MARKERS, OKABE_ITO

LOOKS: dict[str, dict[str, Any]] = {
    "better": {"color": OKABE_ITO[2], "marker": "^"},
    "equivalent": {"color": OKABE_ITO[0], "marker": "o"},
    "worse": {"color": OKABE_ITO[1], "marker": "v"},
    "inconclusive": {"color": "#666666", "marker": "D"},
}
WORDS = tuple(LOOKS)
MANY = 5  # arms whose names stand side by side
LABELS = {"frechet": "Fréchet distance", "held_out": "held-out denoising loss", "probe": "probe accuracy"}


def slope_graph(results: Mapping[str, Any], measure: str = "frechet") -> Figure:
    """A column for each condition: above, one line a seed through all arms; below, the ratio to the reference with its
    95 % interval of each arm that has a verdict, and the margin of what counts as equal; without a verdict the lines
    alone. A crash is a gap in its line.

    The reference stands first, then the arms from the lowest to the highest value in the first condition.
    """
    conditions = list(dict.fromkeys(row["condition"] for row in results["summary"]))
    arms = _sorted_arms(results, measure)
    judged = [arm for arm in arms if any((v["arm"], v["measure"]) == (arm, measure) for v in results["verdicts"])]
    heights = [3.2, 0.9 + 0.27 * len(judged)] if judged else [3.2]
    figure, axes = plt.subplots(
        len(heights), len(conditions), figsize=(2.6 + max(3.6, 0.62 * len(arms)) * len(conditions), sum(heights)),
        squeeze=False, height_ratios=heights, sharey="row",
    )  # fmt: skip
    for column, condition in zip(axes.T, conditions, strict=True):
        _slopes(column[0], results, condition, arms, measure)
        column[0].set_title(condition)
        if judged:
            _differences(column[1], results, condition, judged, measure)
    axes[0, 0].set_ylabel(LABELS.get(measure, measure))
    return figure


def _sorted_arms(results: Mapping[str, Any], measure: str) -> list[str]:
    """Names of all arms, the reference first; one without a value, since all its runs crashed, last."""
    first = results["summary"][0]["condition"]
    means = {
        row["arm"]: row["values"].get(measure, {}).get("mean", math.inf)
        for row in results["summary"]
        if row["condition"] == first
    }
    return sorted(means, key=lambda arm: (arm != results["reference"], means[arm]))


def _slopes(axis: Axes, results: Mapping[str, Any], condition: str, arms: list[str], measure: str) -> None:
    runs = [run for run in results["runs"] if run["condition"] == condition]
    for i, seed in enumerate(sorted({run["seed"] for run in runs})):
        own = {run["arm"]: run["values"].get(measure, math.nan) for run in runs if run["seed"] == seed}
        look: dict[str, Any] = {"color": OKABE_ITO[i % 7], "marker": MARKERS[i % 7]}
        axis.plot(range(len(arms)), [own[arm] for arm in arms], lw=1, ms=4, label=f"seed {seed}", **look)
    axis.set(xticks=range(len(arms)), xlim=(-0.3, len(arms) - 0.7))
    slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticklabels(arms, **(slanted if len(arms) > MANY else {}))
    _log_if_wide(axis, "y")
    if measure.startswith("frechet") and "floor_value" in results["record"]:
        axis.axhline(results["record"]["floor_value"], color="black", linestyle=":", lw=1)


def _differences(axis: Axes, results: Mapping[str, Any], condition: str, arms: list[str], measure: str) -> None:
    known = {v["arm"]: v for v in results["verdicts"] if (v["condition"], v["measure"]) == (condition, measure)}
    for i, arm in enumerate(arms):
        if arm in known:
            _interval(axis, i, known[arm])
    for margin in {verdict["margin"] for verdict in known.values()}:
        axis.axvspan(math.exp(-margin), math.exp(margin), color="#0072B2", alpha=0.06, lw=0)
    axis.axvline(1, color="black", linestyle=":", lw=1)
    axis.set(
        yticks=range(len(arms)), yticklabels=arms, ylim=(max(len(arms), 1) - 0.5, -0.5),
        xlabel=f"ratio to {results['reference']}",
    )  # fmt: skip
    _log_if_wide(axis, "x")


def _interval(axis: Axes, i: int, verdict: Mapping[str, Any]) -> None:
    """Line i of a plot of ratios: the interval in the colour and with the marker of its word, the word at its right."""
    low, mid, high = np.exp([verdict["low"], verdict["mean"], verdict["high"]])
    axis.errorbar(mid, i, xerr=[[mid - low], [high - mid]], capsize=4, **LOOKS[verdict["word"]])
    axis.annotate(
        verdict["word"], (1.01, i), xycoords=axis.get_yaxis_transform(), va="center", fontsize=9, annotation_clip=False
    )


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


def verdict_forest(rows: Sequence[Mapping[str, Any]], show: str = "all") -> Figure:
    """Every verdict of several studies as ratio with interval, one line each; show: all of them, or those of one word.

    Rows: verdicts as in results.json, each with its `study`. All states have one axis and one height.
    """
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.29 * max(len(rows), 4)))
    shown = [row for row in rows if show in ("all", row["word"])]
    for i, row in enumerate(shown):
        _interval(axis, i, row)
        if i and row["study"] != shown[i - 1]["study"]:
            axis.axhline(i - 0.5, color="black", alpha=0.3, lw=0.7)
    lows, highs = (np.exp([row[end] for row in rows]) for end in ("low", "high"))
    axis.axvline(1, color="black", linestyle=":", lw=1)
    axis.set(
        yticks=range(len(shown)), yticklabels=_labels(shown), ylim=(len(rows) - 0.4, -0.6),
        xscale="log", xlim=(min(0.7, lows.min()) / 1.05, max(1.5, highs.max()) * 1.05),
        xlabel="ratio to the reference arm (log axis)",
    )  # fmt: skip
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    return figure


def _labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Study, arm and measure of each row; the condition where its study has several."""
    places = {(row["study"], row["condition"]) for row in rows}
    several = [study for study, n in Counter(study for study, _ in places).items() if n > 1]
    return [
        f"{row['study']}: {row['arm']}{', ' + row['condition'] if row['study'] in several else ''}, {row['measure']}"
        for row in rows
    ]


def single_seeds(results: Mapping[str, Any], arm: str, measure: str = "frechet") -> Figure:
    """What each seed alone would have told of an arm: its ratio to the reference, and the interval of all together."""
    verdict = next(v for v in results["verdicts"] if (v["arm"], v["measure"]) == (arm, measure))
    runs = [run for run in results["runs"] if run["condition"] == verdict["condition"] and measure in run["values"]]
    values = {(run["arm"], run["seed"]): run["values"][measure] for run in runs}
    seeds = sorted({seed for name, seed in values if name == arm and (results["reference"], seed) in values})
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.3 * len(seeds)))
    for i, seed in enumerate(seeds):
        axis.plot(values[arm, seed] / values[results["reference"], seed], i, "o", color=OKABE_ITO[0])
    low, mid, high = np.exp([verdict["low"], verdict["mean"], verdict["high"]])
    axis.errorbar(mid, len(seeds), xerr=[[mid - low], [high - mid]], color="black", marker="s", capsize=4)
    axis.axvline(1, color="black", linestyle=":", lw=1)
    names = [*(f"seed {seed} alone" for seed in seeds), "all, 95 %"]
    axis.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlabel=f"ratio, {arm}")
    return figure


def sign_flips(x: Sequence[float], p: float) -> Figure:
    """The mean of log-ratios x (n,) among the means of all 2^n choices of their signs, one tick each."""
    means = np.array(list(itertools.product((1, -1), repeat=len(x)))) @ np.array(x) / len(x)
    own = abs(float(np.mean(x)))
    far = np.abs(means) >= own - 1e-12
    figure, axis = plt.subplots(figsize=(8, 1.9))
    for which, color, where in ((~far, OKABE_ITO[0], "nearer to 0"), (far, OKABE_ITO[1], "as far out as the data")):
        axis.plot(means[which], np.zeros(which.sum()), "|", ms=34, color=color, label=f"{which.sum()} {where}")
    axis.plot(np.mean(x), 0, "v", color="black", ms=9, label="the data")
    axis.set(
        yticks=[], ylim=(-1, 1.6), xlabel=f"mean log-ratio under each of {len(means)} choices of signs: p = {p:.3f}"
    )
    axis.legend(loc="upper center", ncols=3)
    return figure


def one_word(x: Sequence[float], verdict: Mapping[str, Any]) -> Figure:
    """The pairs' log-ratios x (n,), their 95 % interval, and the margin within which it counts as equal."""
    figure, axis = plt.subplots(figsize=(8, 1.9))
    axis.axvspan(-verdict["margin"], verdict["margin"], color=OKABE_ITO[0], alpha=0.12, lw=0)
    axis.axvline(0, color="black", linestyle=":", lw=1)
    axis.plot(x, np.ones(len(x)), "o", color=OKABE_ITO[0])
    mid = verdict["mean"]
    errors = [[mid - verdict["low"]], [verdict["high"] - mid]]
    axis.errorbar(mid, 0, xerr=errors, capsize=5, **LOOKS[verdict["word"]])
    axis.set(
        yticks=[0, 1], yticklabels=["95 %", "pairs"], ylim=(-0.6, 1.6), xlim=(-0.6, 0.6), xlabel="log-ratio to base",
        title=f"p = {verdict['p']:.3f}, p of equivalence = {verdict['p_equivalent']:.3f}: {verdict['word']}",
    )  # fmt: skip
    return figure
