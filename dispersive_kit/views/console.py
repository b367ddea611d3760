"""Demos that run in the browser, for the last line of a cell, and the lecture console with all demos in large type.

`explore.js` draws and computes; this module makes its input. Samples, neighbours and UMAPs are of the shipped runs.
"""

import base64
import hashlib
import io
import itertools
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dispersive_kit.analysis import LEVELS
from dispersive_kit.analysis.projection import picture_name
from dispersive_kit.analysis.sweep import stored
from dispersive_kit.data import load_images, to_float, to_uint8
from dispersive_kit.data.toy import TOY_SETS, sample_toy
from dispersive_kit.diffusion.paths import LINEAR
from dispersive_kit.diffusion.samplers import euler, initial_noise, time_grid
from dispersive_kit.errors import ConfigError
from dispersive_kit.regularizers import dispersive_loss, floor
from dispersive_kit.training.runs import load_run, run_folder
from dispersive_kit.views.figures import RED, figure_html, heatmaps, scatter
from dispersive_kit.views.lessons import PATHS, T_END, BlockViews, cloud, exact_velocity, level_names
from dispersive_kit.views.widgets import MODULE, Explorer, frames_spec

EACH = 6  # images of an arm in one round of the quiz
ARMS = {"base": "without the loss", "paper": "with Dispersive Loss"}
RUNS = {"MNIST": "mnist-long", "digits": "digits-long", "CIFAR-10": "cifar10-cpu"}  # whose trainings are shown
CHECKPOINTS = (500, 1000, 1500, 2000, 3000, 4000, 5000, 6000)  # training steps that all of them have
FILMS, SCALES = ("MNIST", "digits", "digits, short training"), (1.0, 2.0, 3.0, 5.0)  # of classroom.npz


def playground() -> Explorer:
    """Points that can be dragged, where the loss pushes each, and how far the loss is from its floor."""
    z = cloud(16).requires_grad_()
    loss, low = dispersive_loss(z, tau=0.5), floor("infonce_l2", 16, 0.5)
    (gradient,) = torch.autograd.grad(loss, z)
    figure = scatter({f"loss {loss:.3f}, floor {low:.3f}": z.detach()}, size=4)
    figure.axes[0].quiver(*z.detach().T, *-gradient.T, color=RED, angles="xy")
    alt = f"16 points, and where each is pushed: loss {loss:.3f}, floor {low:.3f}."
    return Explorer({"kind": "playground"}, figure_html(figure, alt))


def trajectories() -> Explorer:
    """The steps of a sampler through the exact velocity field of eight Gaussians, as a film."""
    noise = initial_noise(range(300), (2,), dtype=torch.float64)
    steps = {f"Euler, {n} steps": euler(exact_velocity, noise, time_grid(n, t_min=T_END)) for n in (4, 128)}
    alt = "Samples of Euler's method in 4 steps, still on a ring, and in 128 steps, on eight spots."
    return Explorer({"kind": "trajectories"}, figure_html(scatter(steps), alt))


def training() -> Explorer:
    """A small network that learns a set of points in the browser, with the loss and without."""
    sets = {name: sample_toy(name, 400)[0] for name in TOY_SETS}
    alt = "Four sets of points that the network can learn: eight spots, two moons, a checkerboard, two spirals."
    return Explorer({"kind": "train"}, figure_html(scatter(sets), alt))


def blind_quiz(samples: Mapping[str, Tensor], *, seed: int = 0) -> Explorer:
    """A blind test over two arms' uint8 images (N, C, H, W), image i from the same noise in both.

    A round shows `EACH` images of each arm, so there are N // EACH rounds; `seed` decides the sides of the arms. After
    the last round it names the arms, counts the votes, and gives the p-value of a sign test.
    Raises ConfigError: not two arms, unequal shapes, or too few images for one round.
    """
    shapes = {name: tuple(images.shape) for name, images in samples.items()}
    if len(samples) != 2 or len(set(shapes.values())) != 1 or min(shapes.values())[0] < EACH:
        raise ConfigError(f"a quiz compares two arms of equally many images, {EACH} images or more, got {shapes}")
    rounds = [
        [_sheet(images[k : k + EACH], columns=3, gap=1) for images in samples.values()]
        for k in range(0, len(next(iter(samples.values()))) - EACH + 1, EACH)
    ]
    swapped = torch.randint(2, (len(rounds),), generator=torch.Generator().manual_seed(seed)).bool().tolist()
    alt = f"Left and right, {EACH} images each from the same noises, of one arm each."
    spec = {"kind": "quiz", "arms": list(samples), "rounds": rounds, "swapped": swapped, "alt": alt}
    first = rounds[0][::-1] if swapped[0] else rounds[0]
    images = "".join(f'<img src="{image}" alt="" width="220" hspace="20">' for image in first)
    return Explorer(spec, f'<figure role="img" aria-label="{alt}" style="image-rendering: pixelated">{images}</figure>')


def _sheet(images: Tensor, columns: int, gap: int = 0) -> str:
    """uint8 images (n, C, H, W) in rows of `columns`, as one image in a data URL."""
    framed = F.pad(images, (0, gap, 0, gap), value=255)
    array = torch.cat([torch.cat(list(row), 2) for row in framed.split(columns)], 1).permute(1, 2, 0).numpy()
    array = array[: array.shape[0] - gap, : array.shape[1] - gap]
    return _address(Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array))


def _address(image: Image.Image) -> str:
    """An image as a data URL: small grey ones as PNG, without loss, others as WebP."""
    buffer, kind = io.BytesIO(), "webp" if image.mode == "RGB" or image.width > 200 else "png"
    image.save(buffer, kind, **({"quality": 80} if kind == "webp" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _noise() -> dict[str, Any]:
    digits, times, frames = to_float(load_images("digits", "test").images[:10]), np.linspace(0, 1, 21).tolist(), {}
    noise = torch.randn(digits.shape, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(torch.tensor(times, dtype=torch.float64)):
        paths = {f"{name}, log-SNR {PATHS[name].log_snr(t):.1f}": PATHS[name] for name in ("linear", "GVP", "VP")}
        rows = {name: _sheet(to_uint8(path.x_t(digits, noise, t)), 10, 1) for name, path in paths.items()}
        frames[str(i)] = {"rows": rows, "alt": f"Ten digits with noise at t = {t:.2f}: {'; '.join(rows)}."}
    return frames_spec({"t": np.round(times, 2).tolist()}, (6,), frames, play="t")


def _training() -> dict[str, Any]:
    frames = {}
    for (i, run), (j, step) in itertools.product(enumerate(RUNS.values()), enumerate(CHECKPOINTS)):
        files = {words: run_folder(f"{run}-{arm}") / "previews" / f"step-{step:08d}.png" for arm, words in ARMS.items()}
        rows = {words: _address(Image.open(file)) for words, file in files.items()}
        alt = f"16 samples of each run, {run}, after {step} training steps, from the same noises."
        frames[f"{i},{j}"] = {"rows": rows, "alt": alt}
    return frames_spec({"data": list(RUNS), "step": CHECKPOINTS}, (0, len(CHECKPOINTS) - 1), frames, play="step")


def _denoising(files: Mapping[str, Tensor]) -> dict[str, Any]:
    steps, frames = len(files[f"film/{FILMS[0]}/base/1"]), {}
    for (i, data), (j, scale), k in itertools.product(enumerate(FILMS), enumerate(SCALES), range(steps)):
        rows = {words: _sheet(files[f"film/{data}/{arm}/{scale:g}"][k], 10, 1) for arm, words in ARMS.items()}
        alt = f"{data}: ten samples of each run, one a class, after step {k} of {steps - 1} at CFG scale {scale:g}."
        frames[f"{i},{j},{k}"] = {"rows": rows, "alt": alt}
    controls = {"data": FILMS, "CFG scale": SCALES, "step": range(steps)}
    return frames_spec(controls, (0, 0, steps - 1), frames, play="step")


def _map(files: Mapping[str, Tensor]) -> dict[str, Any]:
    noisy = files["noisy"].flatten(0, 1)
    return {
        "kind": "map",
        "arms": list(ARMS.values()),
        "blocks": (1, 2, 3, 4),
        "levels": level_names(LEVELS),
        "agreement": [np.round(files[f"agreement/{arm}"].numpy(), 4).tolist() for arm in ARMS],
        "nearest": [files[f"nearest/{arm}"][..., :3].tolist() for arm in ARMS],
        "labels": files["labels"].tolist(),
        "digits": {"source": _sheet(files["digits"], 20), "columns": 20, "rows": len(files["digits"]) // 20},
        "noisy": {"source": _sheet(noisy, 6), "columns": 6, "rows": len(noisy) // 6},
    }


def patches(inside: BlockViews) -> Explorer:
    """Patches to click on: the attention of each head from this patch to the others, and the nearest patches."""
    attention = torch.stack(list(inside.attention.values())).transpose(0, 2)  # (B, depth, t, heads, N, N)
    B, depth, _, heads, N, _ = attention.shape
    images, times = torch.stack(list(inside.inputs.values()), 1), list(inside.inputs)  # (B, t, C, H, W)
    nearest = torch.stack([torch.stack([_nearest(z) for z in blocks]) for blocks in inside.features.values()], 1)
    first = {f"t = {t:g}": inside.attention[t][0, 0, 0] for t in times}
    spec = {
        "kind": "patch",
        "controls": {"image": [*range(B)], "t": times, "block": [*range(depth)], "head": [*range(heads)]},
        "side": math.isqrt(N),
        "attention": np.round(attention.transpose(1, 2).double().numpy(), 2).tolist(),
        "nearest": nearest.permute(2, 1, 0, 3, 4).tolist(),
        "sheet": {"source": _sheet(to_uint8(images.flatten(0, 1)), len(times)), "columns": len(times), "rows": B},
    }
    alt = f"Attention of head 0 in block 0 between the {N} patches of an image, at each time."
    return Explorer(spec, figure_html(heatmaps(first, fmt="", xlabel="attends to", ylabel="patch"), alt))


def _nearest(z: Tensor) -> Tensor:
    """For each patch, the indices (B, N, 6) of the six others with the nearest features, counted over all images."""
    rows = z.flatten(0, 1) - z.mean((0, 1))
    return torch.cdist(rows, rows).fill_diagonal_(torch.inf).topk(6, largest=False).indices.view(*z.shape[:2], 6)


def _patches() -> dict[str, Any]:
    data = load_images("digits", "test").subset(torch.arange(6))
    x0, model = to_float(data.images), load_run("digits-long-base")[0]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    noisy = {t: LINEAR.x_t(x0, noise, torch.tensor(t)) for t in (0.1, 0.5, 0.9)}
    return patches(BlockViews(model, noisy, data.labels)).spec


@cache
def _umap() -> dict[str, Any]:
    knobs: dict[str, Any] = {"neighbours": (5, 15, 50), "min_dist": (0.0, 0.1, 0.5), "seed": (0, 1)}
    files, labels, frames = stored("umap-digits.npz"), load_images("digits", "test").labels[:400], {}
    for place in itertools.product(*map(range, map(len, knobs.values()))):
        setting = {name: values[i] for (name, values), i in zip(knobs.items(), place, strict=True)}
        clouds = {words: files[picture_name(arm, *setting.values())] for arm, words in ARMS.items()}
        alt = f"UMAP of 400 digits in both runs, {setting}: points with a colour and a numeral for each class."
        frames[",".join(map(str, place))] = figure_html(scatter(clouds, labels=labels, extent=None, size=4.5), alt)
    return frames_spec(knobs, (1, 1, 0), frames)


def console(seed: int = 0) -> Explorer:
    """Every demo in large type. seed: decides the sides in the blind test."""
    files = stored("classroom.npz")
    demos = {
        **{name: {"kind": name} for name in ("playground", "trajectories", "train")},
        "noise": _noise(),
        "training": _training(),
        "denoising": _denoising(files),
        "map": _map(files),
        "patch": _patches(),
        "umap": _umap(),
        "quiz": blind_quiz({words: files[f"quiz/{arm}"] for arm, words in ARMS.items()}, seed=seed).spec,
    }
    return Explorer({"kind": "console", "demos": demos}, playground().still)


def write_console(file: Path) -> int:
    """Write the console as one page, whose policy blocks all addresses and other scripts; returns its size in bytes."""
    page = Path(__file__).with_name("console.html").read_text(encoding="utf-8")
    page = page.replace("{{ module }}", MODULE.read_text(encoding="utf-8"))
    script = page.partition('<script type="module">')[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(console().spec, ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
    return file.write_bytes(page.replace("{{ digest }}", digest).replace("{{ data }}", data).encode())
