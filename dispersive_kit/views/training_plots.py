"""Figures of a training: its losses against the step."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from dispersive_kit.views.plots import line_look


def loss_curve(losses: Sequence[float], *, goal: float, label: str) -> Figure:
    """One loss against the step, on a log axis, with a dotted line at the goal."""
    figure, axis = plt.subplots(figsize=(6, 3))
    axis.plot(range(1, len(losses) + 1), losses, **line_look(0, every=max(1, len(losses) // 8)))
    axis.axhline(goal, color="0.3", linestyle=":")
    axis.set(xlabel="training step", ylabel=label, yscale="log")
    return figure


def held_out_curves(metrics: Mapping[str, Sequence[Mapping[str, float]]], bins: int = 4) -> Figure:
    """Held-out denoising loss against the step, one line an arm: the mean, then each part of t.

    Args:
        metrics: for each arm the lines of its metrics.jsonl (those without `held_out` are passed over).
    """
    keys = ["held_out", *(f"held_out_t{i}" for i in range(bins))]
    titles = ["mean", *(f"t in [{i / bins:g}, {(i + 1) / bins:g}]" for i in range(bins))]
    figure, axes = plt.subplots(1, len(keys), figsize=(12, 2.8), sharex=True)
    for axis, key, title in zip(axes, keys, titles, strict=True):
        for i, (arm, lines) in enumerate(metrics.items()):
            steps, values = zip(*((m["step"], m[key]) for m in lines if key in m), strict=True)
            axis.plot(steps, values, label=arm, **line_look(i, every=max(1, len(steps) // 6)))
        axis.set(xlabel="training step", title=title, yscale="log")
    axes[0].set_ylabel("held-out denoising loss")
    axes[0].legend()
    return figure
