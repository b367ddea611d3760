"""Demos that compute in the browser, and the lecture console, which is all of them in large type.

    playground()                         # in a notebook, as the last line of a cell
    console()
    write_console(Path("console.html"))  # the same as one file, which fetches nothing

`explore.js` draws; here is what it is given. Samples, neighbours and UMAPs are those of the shipped runs, made before.
"""

import base64
import hashlib
import io
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dispersive_kit.analysis import LEVELS
from dispersive_kit.analysis.projection import picture_name
from dispersive_kit.analysis.sweep import stored
from dispersive_kit.data import load_images
from dispersive_kit.data.toy import sample_toy
from dispersive_kit.errors import ConfigError
from dispersive_kit.regularizers import dispersive_loss, floor
from dispersive_kit.regularizers.losses import LossOptions
from dispersive_kit.training.runs import run_folder
from dispersive_kit.views.figures import RED, scatter
from dispersive_kit.views.lessons import PATHS, SAMPLERS, block_maps, cloud, level_names, trajectory
from dispersive_kit.views.widgets import MODULE, Explorer, frames_spec, still

# What the playground offers: name -> (options of the loss, y axis)
VARIANTS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "l2": ({"kind": "infonce_l2"}, (-5.0, 0.6)),
    "l2, no diagonal": ({"kind": "infonce_l2", "diagonal": False}, (-5.0, 0.6)),
    "cosine": ({"kind": "infonce_cosine"}, (-1.2, 4.3)),
    "hinge": ({"kind": "hinge"}, (-0.15, 4.2)),
    "covariance": ({"kind": "covariance", "tau": None}, (0.4, 1.05)),  # which has no temperature
}
TAUS, BATCHES, SCALES = (0.25, 0.5, 1.0, 2.0), (2, 4, 8, 16, 32), (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0)
EACH = 6  # images of an arm in one round of the quiz
ARMS = {"base": "without the loss", "paper": "with Dispersive Loss"}
CHECKPOINTS = (500, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 10000)  # training steps of the CIFAR-10 runs
STEPS = (1, 2, 4, 8, 16)


def playground() -> Explorer:
    """Points that can be dragged, where the loss pushes each, and how far the loss is from its floor."""
    z = cloud(16).requires_grad_()
    loss, low = dispersive_loss(z, tau=0.5), _floor("l2", 0.5, 16)
    (gradient,) = torch.autograd.grad(loss, z)
    figure = scatter({f"loss {loss:.3f}, floor {low:.3f}": z.detach()}, size=4)
    figure.axes[0].quiver(*z.detach().T, *-gradient.T, color=RED, angles="xy")
    return Explorer(
        _playground(), still(figure, f"16 points, and where each is pushed: loss {loss:.3f}, floor {low:.3f}.")
    )


def _playground() -> dict[str, Any]:
    choices = {"variant": list(VARIANTS), "tau": TAUS, "B": BATCHES, "s": SCALES}
    return {
        "kind": "playground",
        "controls": choices,
        "start": (0, 1, 3, 3),
        "clouds": {str(B): cloud(B).tolist() for B in BATCHES},
        "variants": {
            name: {"kind": options["kind"], "diagonal": LossOptions(**options).with_diagonal, "limits": limits}
            for name, (options, limits) in VARIANTS.items()
        },
        "floors": {f"{v},{t:g},{n}": _floor(v, t, n) for v, t, n in itertools.product(VARIANTS, TAUS, BATCHES)},
    }


def _floor(variant: str, tau: float, B: int) -> float | None:
    options = {"tau": tau, "diagonal": None, **VARIANTS[variant][0]}
    low = floor(options["kind"], B, options["tau"], dim=2, diagonal=options["diagonal"])
    return low if low > -np.inf else None


def blind_quiz(samples: Mapping[str, Tensor], *, seed: int = 0) -> Explorer:
    """A blind test over two arms' uint8 images (N, C, H, W), image i from the same noise in both.

    A round shows `EACH` images an arm, so there are N // EACH rounds, in which the arms change sides (seed). After the
    last, it names the arms, counts the votes, and says how often a coin would part them so.

    Raises:
        ConfigError: not two arms, unequal shapes, or too few images for one round.
    """
    spec = _quiz(samples, seed)
    first = spec["rounds"][0][::-1] if spec["swapped"][0] else spec["rounds"][0]
    images = "".join(f'<img src="{image}" alt="" width="220" hspace="20">' for image in first)
    return Explorer(spec, f'<figure role="img" aria-label="{spec["alt"]}">{images}</figure>')


def _quiz(samples: Mapping[str, Tensor], seed: int) -> dict[str, Any]:
    if len(samples) != 2 or len({images.shape for images in samples.values()}) != 1:
        shapes = {name: tuple(images.shape) for name, images in samples.items()}
        raise ConfigError(f"a quiz compares two arms of equally many images, got {shapes}")
    rounds = [
        [_sheet(images[k : k + EACH], columns=3, gap=1) for images in samples.values()]
        for k in range(0, len(next(iter(samples.values()))) - EACH + 1, EACH)
    ]
    if not rounds:
        raise ConfigError(f"a round takes {EACH} images of each arm: give at least so many")
    swapped = torch.randint(2, (len(rounds),), generator=torch.Generator().manual_seed(seed)).bool().tolist()
    alt = f"Left and right, {EACH} images each from the same noises, of one arm each."
    return {"kind": "quiz", "arms": list(samples), "rounds": rounds, "swapped": swapped, "alt": alt}


def _sheet(images: Tensor, columns: int, gap: int = 0) -> str:
    """uint8 images (n, C, H, W) in rows of `columns` as one address."""
    framed = F.pad(images, (0, gap, 0, gap), value=255)
    array = torch.cat([torch.cat(list(row), 2) for row in framed.split(columns)], 1).permute(1, 2, 0).numpy()
    array = array[: array.shape[0] - gap, : array.shape[1] - gap]
    return _address(Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array))


def _address(image: Image.Image) -> str:
    """Grey ones as PNG, exactly, others as WebP."""
    buffer, kind = io.BytesIO(), "webp" if image.mode == "RGB" else "png"
    image.save(buffer, kind, **({"quality": 80} if kind == "webp" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _short(x: Any, digits: int = 2) -> Any:
    return np.round(np.asarray(x, dtype=float), digits).tolist()


def _noise() -> dict[str, Any]:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    sets = {name: _short(sample_toy(name, 500)[0]) for name in ("eight-gaussians", "two-moons", "spirals")}
    paths = {
        name: _short(torch.stack([PATHS[name].alpha(t), PATHS[name].sigma(t)], 1), 5)
        for name in ("linear", "GVP", "VP")
    }
    eps = _short(torch.randn(500, 2, generator=torch.Generator().manual_seed(1)))
    controls = {"data": list(sets), "path": list(paths), "t": _short(t)}
    return {"kind": "noise", "controls": controls, "start": (0, 0, 50), "sets": sets, "paths": paths, "eps": eps}


def trajectories() -> Explorer:
    """Where each step of a sampler leads through the exact field of eight Gaussians, as a film."""
    ends = {"Euler, 4 steps": trajectory("Euler", 4)[-1], "the same noise, carried exactly": trajectory("RK4", 128)[-1]}
    alt = "Samples of Euler's method in 4 steps, and where the exact ODE carries the same noise: eight spots."
    return Explorer(_trajectories(), still(scatter(ends), alt))


def _trajectories() -> dict[str, Any]:
    controls = {"sampler": list(SAMPLERS), "steps": STEPS, "part": _short(np.linspace(0, 1, 21))}
    ways = {f"{s},{n}": _short(trajectory(s, n)[:, :200]) for s in SAMPLERS for n in STEPS}  # (n + 1, 200, 2)
    calls = {name: calls for name, (_, calls) in SAMPLERS.items()}
    start, exact = (0, STEPS.index(4), 20), _short(trajectory("RK4", 128)[-1, :200])
    return {"kind": "sampler", "controls": controls, "start": start, "ways": ways, "calls": calls, "exact": exact}


def _training() -> dict[str, Any]:
    frames = {}
    for i, step in enumerate(CHECKPOINTS):
        files = {
            words: run_folder(f"cifar10-cpu-{arm}") / "previews" / f"step-{step:08d}.png" for arm, words in ARMS.items()
        }
        rows = {words: _address(Image.open(file).convert("RGB")) for words, file in files.items()}
        alt = f"16 CIFAR-10 samples of each run after {step} training steps, from the same noises."
        frames[str(i)] = {"rows": rows, "alt": alt}
    return frames_spec({"step": CHECKPOINTS}, (len(CHECKPOINTS) - 1,), frames, play="step")


def _guidance(files: Mapping[str, Tensor]) -> dict[str, Any]:
    sets, scales, frames = ("digits", "CIFAR-10"), (1.0, 1.5, 2.0, 3.0, 5.0), {}
    for (i, data), (j, scale) in itertools.product(enumerate(sets), enumerate(scales)):
        rows = {words: _sheet(files[f"guided/{data}/{arm}/{scale:g}"], 10, 1) for arm, words in ARMS.items()}
        alt = f"20 {data} samples of each run at CFG scale {scale:g}, one class a column."
        frames[f"{i},{j}"] = {"rows": rows, "alt": alt}
    return frames_spec({"data": sets, "scale": scales}, (0, 0), frames)


def _map(files: Mapping[str, Tensor]) -> dict[str, Any]:
    noisy = files["noisy"].flatten(0, 1)
    return {
        "kind": "map",
        "arms": list(ARMS.values()),
        "blocks": (1, 2, 3, 4),
        "levels": level_names(LEVELS),
        "start": (2, 2),
        "agreement": [_short(files[f"agreement/{arm}"], 4) for arm in ARMS],
        "nearest": [files[f"nearest/{arm}"][..., :3].tolist() for arm in ARMS],
        "labels": files["labels"].tolist(),
        "digits": {"source": _sheet(files["digits"], 20), "columns": 20, "rows": len(files["digits"]) // 20},
        "noisy": {"source": _sheet(noisy, 6), "columns": 6, "rows": len(noisy) // 6},
    }


def _umap() -> dict[str, Any]:
    controls: dict[str, Any] = {"neighbours": (5, 15, 50), "min_dist": (0.0, 0.1, 0.5), "seed": (0, 1)}
    files, names = (
        stored("umap-digits.npz"),
        itertools.starmap(picture_name, itertools.product(ARMS, *controls.values())),
    )
    return {
        "kind": "umap",
        "controls": controls,
        "start": (1, 1, 0),
        "arms": ARMS,
        "clouds": {name: _short(files[name]) for name in names},
        "labels": load_images("digits", "test").labels[:400].tolist(),
        "colours": sns.color_palette("husl", 10).as_hex(),
    }


def block_neighbours() -> Explorer:
    """Whom each block of the shipped digits runs takes for neighbours at each level of noise: a map to click on."""
    files = stored("classroom.npz")
    shares = {words: files[f"agreement/{arm}"] for arm, words in ARMS.items()}
    figure = block_maps(shares, LEVELS, "neighbours of the class", fmt=".0%")
    alt = "Share of the five nearest images that have an image's own class, by block and log-SNR, in both runs."
    return Explorer(_map(files), still(figure, alt))


def console(seed: int = 0) -> Explorer:
    """Every demo in large type. seed: of the sides in the blind test."""
    return Explorer(_console(seed), playground().still)


def _console(seed: int) -> dict[str, Any]:
    files = stored("classroom.npz")
    demos = {
        "playground": _playground(),
        "noise": _noise(),
        "sampler": _trajectories(),
        "training": _training(),
        "guidance": _guidance(files),
        "map": _map(files),
        "umap": _umap(),
        "quiz": _quiz({words: files[f"quiz/{arm}"] for arm, words in ARMS.items()}, seed),
    }
    return {"kind": "console", "demos": demos}


def write_console(file: Path) -> int:
    """Write the console as one page, whose policy refuses every address and other script; gives its size in bytes."""
    page = Path(__file__).with_name("console.html").read_text(encoding="utf-8")
    script = "\n" + MODULE.read_text(encoding="utf-8") + "\nalone();\n"
    data = json.dumps(_console(0), ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace("{{ digest }}", digest).replace("{{ script }}", script).replace("{{ data }}", data)
    return file.write_bytes(page.encode())
