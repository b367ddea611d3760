"""The demos of the lecture console: each a function of its state that returns a picture as SVG, its controls, a hint.

Samples, neighbours and UMAPs are those of the shipped runs, made beforehand; all else is computed as it is shown.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import seaborn as sns
import torch
from PIL import Image
from torch import Tensor

from dispersive_kit.analysis import LEVELS
from dispersive_kit.analysis.projection import picture_name
from dispersive_kit.analysis.sweep import stored as load_stored
from dispersive_kit.data import load_images
from dispersive_kit.data.toy import sample_toy
from dispersive_kit.training.runs import run_folder
from dispersive_kit.views.figures import BLUE, GREEN, RED, level_names
from dispersive_kit.views.lessons import PATHS, SAMPLERS, SHOWN, trajectory
from dispersive_kit.views.svg import HEIGHT, Panel, bitmap, image_grid, picture, text

ARMS = {"base": "without the loss", "paper": "with Dispersive Loss"}
SQUARE = (44, 420)  # top and size of a square panel
LEFT = (150, SQUARE[0], SQUARE[1], SQUARE[1])
RIGHT = (660, SQUARE[0], SQUARE[1], SQUARE[1])
TIMES = tuple(round(0.1 * k, 1) for k in range(11))
POINTS, SAMPLES = 500, 200  # dots of a picture
CHECKPOINTS = (500, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 10000)  # training steps of the CIFAR-10 runs
LEVEL_NAMES = tuple(level_names(LEVELS))
BLOCKS = (1, 2, 3, 4)


def noise(data: str = "eight-gaussians", path: str = "linear", t: float = 0.5) -> str:
    """Points of a 2-D set at time t of a path, always the same points and noise; and alpha and sigma over t."""
    x0, _ = sample_toy(data, POINTS)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    p, time = PATHS[path], torch.tensor(t, dtype=torch.float64)
    alpha, sigma, snr = (float(f(time)) for f in (p.alpha, p.sigma, p.log_snr))
    plane, curves = Panel(LEFT, (-3, 3), (-3, 3)), Panel((*RIGHT[:3], 320), (0, 1), (0, 1.02))
    line = torch.linspace(0, 1, 60, dtype=torch.float64)
    known = f"{snr:.1f}" if abs(snr) < 30 else "infinite" if snr > 0 else "minus infinite"
    return picture(
        plane.frame(f"{data}, t = {t:g}"),
        plane.dots(p.x_t(x0, eps, time), BLUE),
        curves.frame(f"α = {alpha:.2f} (data), σ = {sigma:.2f} (noise)", x="t", ticks=(0, 0.5, 1)),
        curves.line(torch.stack([line, p.alpha(line)], 1), BLUE, 4),
        curves.line(torch.stack([line, p.sigma(line)], 1), RED, 4, "14 8"),
        curves.dots([(t, alpha)], BLUE, 22, 1) + curves.dots([(t, sigma)], RED, 22, 1),
        text(870, HEIGHT - 6, f"log-SNR {known}", anchor="middle"),
        alt=f"{POINTS} points of {data} at t = {t:g} of the {path} path: alpha {alpha:.2f}, sigma {sigma:.2f}, "
        f"log-SNR {known}.",
    )


def sampler(sampler: str = "Euler", steps: int = 4, part: float = 1.0) -> str:
    """Samples after a part of the steps, the way some took, and where the exact ODE carries the same noise."""
    ways, done = trajectory(sampler, steps), int(part * steps)
    calls = SAMPLERS[sampler][1] * done
    left, right = (Panel(box, (-3.2, 3.2), (-3.2, 3.2)) for box in (LEFT, RIGHT))
    return picture(
        left.frame(f"{sampler}: step {done} of {steps}, {calls} evaluations"),
        *(left.line(ways[: done + 1, i], "#9a9a9a", 1.5) for i in range(SHOWN)),
        left.dots(ways[done, :SAMPLES], RED, 6),
        right.frame("the same noise, carried exactly"),
        right.dots(trajectory("RK4", 128)[-1, :SAMPLES], BLUE, 6),
        alt=f"{SAMPLES} samples after step {done} of {steps} of {sampler}, {calls} evaluations of the velocity, beside "
        "the same noise carried exactly to eight Gaussians.",
    )


def _two_rows(pictures: Mapping[str, str], words: Mapping[str, str], alt: str) -> str:
    """Arms below each other, each under its name."""
    labels = [text(10, 26 + 238 * i, words[arm]) for i, arm in enumerate(pictures)]
    return picture(*labels, *pictures.values(), alt=alt)


def checkpoints(step: int = CHECKPOINTS[-1]) -> str:
    """16 samples of each CIFAR-10 run after so many training steps, a column from one noise."""
    rows = {}
    for i, arm in enumerate(ARMS):
        file = run_folder(f"cifar10-cpu-{arm}") / "previews" / f"step-{step:08d}.png"
        rows[arm] = bitmap(Image.open(file).convert("RGB"), (200, 34 + 238 * i, 790, 199))
    words = {arm: f"{name}, step {step}" for arm, name in ARMS.items()}
    return _two_rows(rows, words, f"16 CIFAR-10 samples of each run after {step} training steps, from the same noises.")


@cache
def stored() -> dict[str, Tensor]:
    return load_stored("classroom.npz")


def guidance(data: str = "digits", scale: float = 1.0) -> str:
    """Samples of both runs at one scale of classifier-free guidance, each place one noise and one class."""
    rows = {
        arm: image_grid(stored()[f"guided/{data}/{arm}/{scale:g}"], (110, 34 + 238 * i, 970, 196), columns=10)
        for i, arm in enumerate(ARMS)
    }
    words = {arm: f"{name}, CFG scale {scale:g}" for arm, name in ARMS.items()}
    return _two_rows(rows, words, f"20 {data} samples of each run at CFG scale {scale:g}, one class a column.")


def agreement(arm: str) -> Tensor:
    """Share of nearest neighbours of an image's own class (levels, blocks): the numbers of the map."""
    return stored()[f"agreement/{arm}"]


def block_map(arm: str = "base", level: str = "2", block: int = 3) -> str:
    """Six noisy digits as the network sees them, and whom one block takes for their nearest neighbours."""
    at, data = LEVEL_NAMES.index(level), stored()
    near = data[f"nearest/{arm}"][at, block - 1].long()  # (QUERIES, NEAREST)
    share = float(agreement(arm)[at, block - 1])
    where = f"log-SNR {level}" if level != "clean" else "no noise"
    title = f"block {block}, {where}: {share:.0%} of the 5 nearest share the class"
    parts = [text(0, 24, title), *(text(0, y, word) for y, word in ((88, "seen"), (176, "clean"), (280, "nearest")))]
    for i, others in enumerate(near):
        x = 96 + 128 * i
        parts.append(image_grid(data["noisy"][at, i : i + 1], (x, 40, 80, 80), 1))
        parts.append(image_grid(data["digits"][i : i + 1], (x, 128, 80, 80), 1))
        for k, j in enumerate(others[:3]):
            y, own = 232 + 82 * k, bool(data["labels"][j] == data["labels"][i])
            parts.append(image_grid(data["digits"][j : j + 1], (x, y, 74, 74), 1))
            parts.append(text(x + 80, y + 46, "✓" if own else "✗", color=GREEN if own else RED))
    alt = f"{ARMS[arm]}, {title}. Six digits as the network sees them, and the three nearest others of each."
    return picture(*parts, alt=alt, width=870)


@cache
def umap_pictures() -> dict[str, np.ndarray]:
    return {name: one.numpy() for name, one in load_stored("umap-digits.npz").items()}


@cache
def digit_labels() -> Tensor:
    return load_images("digits", "test").labels[:400]


def umap(neighbours: int = 15, min_dist: float = 0.1, seed: int = 0) -> str:
    """UMAP of the last block's features of both digits runs, one colour and one numeral a class."""
    parts, labels = [], digit_labels().numpy()
    colours = sns.color_palette("husl", 10).as_hex()
    for box, (arm, name) in zip((LEFT, RIGHT), ARMS.items(), strict=True):
        x = umap_pictures()[picture_name(arm, neighbours, min_dist, seed)]
        middle, reach = x.mean(0), 1.05 * np.abs(x - x.mean(0)).max()
        panel = Panel(box, (middle[0] - reach, middle[0] + reach), (middle[1] - reach, middle[1] + reach))
        parts.append(panel.frame(name))
        for k in range(10):
            own = x[labels == k]
            px, py = panel.pixels(np.median(own, axis=0)[None])[0]
            parts.append(panel.dots(own, colours[k], 7) + text(px, py + 8, str(k), anchor="middle"))
    return picture(
        *parts,
        alt=f"UMAP of 400 digits in both runs with {neighbours} neighbours, min_dist {min_dist:g}, seed {seed}: one "
        "cloud each, no class an island.",
    )


@dataclass(frozen=True)
class Demo:
    """A view and what its sliders and menus offer; `cells` names the control across and the one down of a map."""

    title: str
    hint: str
    view: Callable[..., str]
    controls: Mapping[str, Sequence[Any]]
    start: Mapping[str, Any]
    cells: tuple[str, str] | None = None


DEMOS = {
    "noise": Demo(
        "Noise and paths",
        "Move t. At which t do the eight spots melt? Change the path: is it the same t, or the same log-SNR?",
        noise,
        {"data": ("eight-gaussians", "two-moons", "spirals"), "path": ("linear", "GVP", "VP"), "t": TIMES},
        {"t": 0.5},
    ),
    "sampler": Demo(
        "Samplers, step by step",
        "Move part: watch the steps. Then halve the evaluations: which sampler survives?",
        sampler,
        {"sampler": tuple(SAMPLERS), "steps": (1, 2, 4, 8, 16), "part": (0.0, 0.25, 0.5, 0.75, 1.0)},
        {"steps": 4, "part": 1.0},
    ),
    "checkpoints": Demo(
        "Training, checkpoint by checkpoint",
        "Same noise in a column. When does colour settle, when shape? Do the two runs part?",
        checkpoints,
        {"step": CHECKPOINTS},
        {"step": CHECKPOINTS[-1]},
    ),
    "guidance": Demo(
        "Guidance",
        "Same noise in each place. Raise the scale: what is gained, and what do all images of a class lose?",
        guidance,
        {"data": ("digits", "CIFAR-10"), "scale": (1.0, 1.5, 2.0, 3.0, 5.0)},
        {"scale": 1.0},
    ),
    "map": Demo(
        "What each block knows",
        "Click on a cell: six digits as the network sees them, and whom this block takes for their neighbours.",
        block_map,
        {"arm": tuple(ARMS), "block": BLOCKS, "level": LEVEL_NAMES},
        {"arm": "base", "block": 3, "level": "2"},
        cells=("block", "level"),
    ),
    "umap": Demo(
        "UMAP",
        "Does your impression survive another seed? Areas and distances carry no dispersion meaning.",
        umap,
        {"neighbours": (5, 15, 50), "min_dist": (0.0, 0.1, 0.5), "seed": (0, 1)},
        {"neighbours": 15, "min_dist": 0.1},
    ),
}


def quiz_samples() -> dict[str, Tensor]:
    """Digits of both runs for the blind quiz (60, 1, 8, 8), by the name that the reveal gives."""
    return {name: stored()[f"quiz/{arm}"] for arm, name in ARMS.items()}
