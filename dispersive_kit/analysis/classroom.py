"""What the lecture console shows of the shipped runs, drawn beforehand: `dispersive-kit artefacts build classroom`.

Samples at several scales of guidance, pairs for the blind quiz, and whom each block takes for neighbours at each level
of noise. Images that share a place share their noise and their label.
"""

import numpy as np
import torch
from torch import Tensor

from dispersive_kit.analysis.features import extract, noisy, pooled
from dispersive_kit.analysis.similarity import neighbours
from dispersive_kit.analysis.umap_grid import ARMS
from dispersive_kit.data import ImageSet, load_images, to_uint8
from dispersive_kit.data.artefacts import FOLDER, artefact
from dispersive_kit.evaluation import balanced_labels, generate
from dispersive_kit.models.dit import DiT
from dispersive_kit.training import load_run
from dispersive_kit.training.shipped import shipped

FILE = "classroom.npz"
SETS = {"digits": "digits", "CIFAR-10": "cifar10-cpu"}
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
SHOWN = 20  # samples of an arm at one scale
QUIZ = 60
IMAGES, QUERIES, NEAREST = 400, 6, 5  # of held-out digits


def samples(name: str, scale: float, n: int) -> Tensor:
    """n uint8 images (n, C, H, W) of a shipped run, the classes in turn."""
    model, card = load_run(shipped(name))
    return generate(model, balanced_labels(n, model.num_classes), objective=card["config"].objective, cfg_scale=scale)


def nearest(model: DiT, data: ImageSet) -> Tensor:
    """The nearest other images by pooled features (levels, blocks, N, NEAREST), at log-SNRs `LEVELS`."""
    levels = extract(pooled(model), data.images)  # (1, blocks, N, D) each
    return torch.stack([torch.stack([neighbours(x, NEAREST) for x in level[0]]) for level in levels])


def agreement(near: Tensor, labels: Tensor) -> Tensor:
    """How often the nearest others (..., N, k) have the class of the image: (...)."""
    return (labels[near] == labels[:, None]).double().mean((-2, -1))


def make() -> dict[str, np.ndarray]:
    """Every array by name; about three minutes on one core."""
    data = load_images("digits", "test").subset(torch.arange(IMAGES))
    found: dict[str, Tensor] = {}
    for arm, run in ARMS.items():
        near = nearest(load_run(shipped(run))[0], data)
        found |= {f"agreement/{arm}": agreement(near, data.labels), f"nearest/{arm}": near[:, :, :QUERIES].short()}
        found[f"quiz/{arm}"] = samples(run, 1.0, QUIZ)
        for name, prefix in SETS.items():
            for scale in SCALES:
                found[f"guided/{name}/{arm}/{scale:g}"] = samples(f"{prefix}-{arm}", scale, SHOWN)
    seen = [to_uint8(x) for _, _, x, _ in noisy(data.images[:QUERIES])]
    found |= {"digits": data.images, "labels": data.labels.byte(), "noisy": torch.stack(seen)}
    return {name: value.numpy() for name, value in found.items()}


def build() -> None:
    np.savez_compressed(FOLDER / FILE, **make())  # type: ignore[arg-type]


def load() -> dict[str, Tensor]:
    """The arrays of the package by name.

    Raises:
        DataError: the file is missing or damaged.
    """
    with np.load(artefact(FILE), allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}
