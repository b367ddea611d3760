"""Figures of the lesson on noise: schedules, points on their way to noise, and what can still be known of them."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dispersive_kit.data.toy import sample_toy
from dispersive_kit.diffusion.paths import DDPMPath, GVPPath, LinearPath, Path, VPPath
from dispersive_kit.views.plots import DASHES, MARKERS, OKABE_ITO
from dispersive_kit.views.toy_plots import BLUE, GREY, RED, square, two_axes

PATHS: dict[str, Path] = {
    "linear": LinearPath(),
    "GVP": GVPPath(),
    "VP": VPPath(),
    "DDPM linear": DDPMPath(),
    "DDPM cosine": DDPMPath("cosine"),
}
TIMES = tuple(round(0.05 * k, 2) for k in range(21))
LINE = torch.linspace(2e-3, 1 - 2e-3, 250, dtype=torch.float64)  # away from the ends, where log-SNR is infinite
POINTS = 1500


def schedule_curves() -> Figure:
    """What is left of the data, the variance of unit-variance data, and log-SNR against t, one line a path."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    for i, (name, path) in enumerate(PATHS.items()):
        alpha, sigma = path.alpha(LINE), path.sigma(LINE)
        for axis, values in zip(axes, (alpha, alpha**2 + sigma**2, path.log_snr(LINE)), strict=True):
            look = {"color": OKABE_ITO[i], "linestyle": DASHES[i], "marker": MARKERS[i], "markersize": 4}
            axis.plot(LINE, values, label=name, markevery=(10 * i, 50), **look)
    for axis, label in zip(axes, ("α, share of the data", "variance of $x_t$", "log-SNR"), strict=True):
        axis.set(xlabel="t (0: data, 1: noise)", ylabel=label)
    axes[1].set_ylim(0, 1.1)
    axes[2].set_ylim(-12, 12)
    axes[0].legend(fontsize=9)
    return figure


def noise_frame(data: str = "eight-gaussians", path: str = "linear", t: float = 0.5) -> Figure:
    """Left: points of a 2-D set at time t of a path, always the same points and noise. Right: where on the path."""
    x0, _ = sample_toy(data, POINTS)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    time, p = torch.tensor(t, dtype=torch.float64), PATHS[path]
    x = p.x_t(x0, eps, time)  # (POINTS, 2)
    figure, left, right = two_axes(height=4.2)
    left.plot(*x.T, ".", color=BLUE, markersize=2, alpha=0.6)
    square(left, f"{data}, t = {t:g}", extent=4.0)
    for name, curve, color, dash in (("α", p.alpha, BLUE, "-"), ("σ", p.sigma, RED, "--")):
        right.plot(LINE, curve(LINE), color=color, linestyle=dash, label=name)
        right.plot(t, curve(time), "D", color=color, markersize=9, clip_on=False)
    right.axvline(t, color=GREY, linewidth=1)
    title = f"{path}: α = {p.alpha(time):.2f}, σ = {p.sigma(time):.2f}, log-SNR = {p.log_snr(time):.1f}"
    right.set(xlim=(0, 1), ylim=(-0.02, 1.05), xlabel="t", title=title)
    right.legend(loc="center right")
    return figure


def against_time_and_snr(curves: Mapping[str, Sequence[float]], times: Tensor, label: str) -> Figure:
    """One measured curve a path of `PATHS`, at `times` (n,): against t, and the same values against log-SNR."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True)
    for i, (name, values) in enumerate(curves.items()):
        look = {"color": OKABE_ITO[i], "linestyle": DASHES[i], "marker": MARKERS[i], "markersize": 5}
        axes[0].plot(times, values, label=name, **look)
        axes[1].plot(PATHS[name].log_snr(times), values, **look)
    axes[0].set(xlabel="t", ylabel=label, ylim=(0, 1.04))
    axes[1].set(xlabel="log-SNR (data to the left)", xlim=(8, -8))
    axes[0].legend(fontsize=9)
    return figure


def snr_histogram(samples: Mapping[str, Tensor]) -> Figure:
    """Which log-SNR a training sees, one curve for each way to draw t; samples of log-SNR (n,)."""
    figure, axis = plt.subplots(figsize=(7.4, 3.3))
    for i, (name, values) in enumerate(samples.items()):
        look = {"color": OKABE_ITO[i], "linestyle": DASHES[i], "linewidth": 2}
        sns.kdeplot(x=values.clamp(-16, 16).numpy(), ax=axis, label=name, cut=0, **look)
    axis.set(xlim=(14, -14), xlabel="log-SNR (data to the left)", ylabel="density of training samples")
    axis.legend(fontsize=9)
    return figure
