"""Figures of the lessons on sampling: paths through the exact velocity of eight Gaussians, and the price of a step."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dispersive_kit.data.toy import GaussianMixture, eight_gaussians
from dispersive_kit.diffusion.guidance import ClassifierFree
from dispersive_kit.diffusion.paths import LINEAR
from dispersive_kit.diffusion.samplers import euler, euler_maruyama, heun, initial_noise, rk4, time_grid
from dispersive_kit.views.plots import DASHES, MARKERS, OKABE_ITO
from dispersive_kit.views.toy_plots import BLUE, GREY, RED, square, two_axes

T_END = 1e-3  # at t = 0 the exact velocity is 0 / 0
POINTS, SHOWN = 300, 24
SAMPLERS: dict[str, tuple[Callable[..., Tensor], int]] = {  # with the evaluations of a step
    "euler": (euler, 1),
    "heun": (heun, 2),
    "rk4": (rk4, 4),
    "SDE (euler_maruyama)": (euler_maruyama, 1),
}
STEPS = (1, 2, 4, 8, 16, 32)
PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
INTERVALS = {"always": (0.0, 1.0), "only t < 0.5": (0.0, 0.5), "only t > 0.5": (0.5, 1.0)}
DATA = eight_gaussians()
CLASSES = [GaussianMixture(DATA.means[rows], DATA.std) for rows in ([0, 1, 7], [2, 3, 4, 5, 6])] + [DATA]
NULL = 2  # the last of `CLASSES`: all eight


def exact_velocity(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """E[eps - x0 | x_t = x, y] (B, 2) of eight Gaussians on the linear path; class 0 is the three on the right,
    1 the other five, and `NULL`, or no y, all eight.
    """
    if y is None:
        return LINEAR.convert(DATA.posterior_mean(x, 1 - t, t), x, t, "x0", "v")
    of_class = torch.stack([c.posterior_mean(x, 1 - t, t) for c in CLASSES])  # (3, B, 2)
    return LINEAR.convert(of_class[y, torch.arange(len(x))], x, t, "x0", "v")


def steps_down(num_steps: int) -> Tensor:
    return time_grid(num_steps, t_min=T_END)


@cache
def trajectory(sampler: str, num_steps: int) -> Tensor:
    """Where each step of `SAMPLERS[sampler]` leads: (num_steps + 1, POINTS, 2), from the same noise each time."""
    x = initial_noise(range(POINTS), (2,), dtype=torch.float64)
    visited = [x]
    SAMPLERS[sampler][0](
        exact_velocity, x, steps_down(num_steps), seeds=range(POINTS), callback=lambda _i, _t, x: visited.append(x)
    )
    return torch.stack(visited)


def stepper(sampler: str = "euler", num_steps: int = 4, part: float = 1.0) -> Figure:
    """Left: samples after a part of the steps, and the way some of them took. Right: where the exact ODE takes them."""
    ways = trajectory(sampler, num_steps)
    done = int(part * num_steps)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.6), layout="none")
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.08, top=0.9, wspace=0.15)
    left.plot(*ways[: done + 1, :SHOWN].unbind(2), color=GREY, linewidth=0.8, marker=".", markersize=3)
    calls = done * SAMPLERS[sampler][1]
    for axis, x, color in ((left, ways[done], RED), (right, trajectory("rk4", 128)[-1], BLUE)):
        axis.plot(*DATA.means.T, "+", color="black", markersize=9)
        axis.plot(*x.T, ".", color=color, markersize=3, alpha=0.7)
    square(left, f"{sampler}: step {done} of {num_steps}, {calls} evaluations", extent=3.2)
    square(right, "the same noise, carried exactly", extent=3.2)
    return figure


@cache
def guided(cfg_scale: float, interval: str) -> Tensor:
    """Samples (POINTS, 2) of class 0 with the exact velocities and classifier-free guidance."""
    y = torch.zeros(POINTS, dtype=torch.long)
    low, high = INTERVALS[interval]
    guidance = ClassifierFree(y, NULL, cfg_scale, low=low, high=high)
    x = initial_noise(range(POINTS), (2,), dtype=torch.float64)
    return heun(exact_velocity, x, steps_down(32), guidance=guidance)


def guidance_frame(cfg_scale: float = 3.0, interval: str = "always") -> Figure:
    """Guided samples over the data of their class, and how far along x they lie, against unguided ones."""
    x = guided(cfg_scale, interval)
    figure, left, right = two_axes(height=4.2)
    left.plot(*guided(1.0, "always").T, ".", color=GREY, markersize=3, label="scale 1: the class as it is")
    left.plot(*x.T, "x", color=RED, markersize=4, alpha=0.7, label="guided")
    left.plot(*CLASSES[0].means.T, "+", color="black", markersize=10)
    square(left, f"scale {cfg_scale:g}, {interval}", extent=2.6)
    left.legend(loc="lower left", fontsize=9)
    for values, color, hatch in ((guided(1.0, "always"), GREY, None), (x, RED, "//")):
        look: dict[str, Any] = {"facecolor": "none" if hatch else color, "edgecolor": color, "hatch": hatch}
        right.hist(values[:, 0].numpy(), bins=torch.linspace(0, 2.6, 53).tolist(), **look)
    right.set(xlim=(0, 2.6), ylim=(0, 80), xlabel="horizontal coordinate", ylabel=f"samples of {POINTS}")
    return figure


def _lines(axis: Axes, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    for i, (name, (x, y)) in enumerate(curves.items()):
        axis.plot(x, y, color=OKABE_ITO[i], linestyle=DASHES[i], marker=MARKERS[i], markersize=5, label=name)


def price_of_a_step(
    errors: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    distances: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    floor: float,
) -> Figure:
    """Against the evaluations of the model: the error of the ODE, and the distance of the samples to the data.

    Both: name -> (evaluations, values). floor: the distance of real data to real data.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.7))
    _lines(left, errors)
    _lines(right, distances)
    right.axhline(floor, color="black", linestyle=":", label="real against real")
    for axis in (left, right):
        axis.set(xscale="log", xlabel="evaluations of the model")
    left.set(yscale="log", ylim=(1e-9, 3), ylabel="median error of a sample")
    right.set(ylim=(0, 1.6), ylabel="W2 to the data")
    left.legend(fontsize=9)
    right.legend(fontsize=9)
    return figure


def distance_against_steps(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], floor: float) -> Figure:
    """W2 to the data against the number of steps, one line an arm: name -> (steps, W2)."""
    figure, axis = plt.subplots(figsize=(7.4, 3.6))
    _lines(axis, curves)
    axis.axhline(floor, color="black", linestyle=":", label="real against real")
    steps = next(iter(curves.values()))[0]
    axis.set(xscale="log", yscale="log", xlabel="steps", ylabel="W2 to the data", ylim=(0.1, 12))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xticks(steps, [f"{n:g}" for n in steps])
    axis.minorticks_off()
    axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
