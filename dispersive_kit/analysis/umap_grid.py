"""The UMAP pictures that come with the package: numba compiles for a minute before umap draws its first.

`dispersive-kit artefacts build umap` makes the file anew from the shipped digits runs, and from a digits run that it
trains in order to keep its checkpoints.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dispersive_kit.analysis import projection
from dispersive_kit.analysis.features import extract, pooled
from dispersive_kit.data import ImageSet, load_images
from dispersive_kit.data.artefacts import FOLDER, artefact
from dispersive_kit.errors import DataError
from dispersive_kit.models.dit import DiT
from dispersive_kit.training import load_run, train, train_preset
from dispersive_kit.training.checkpoint import checkpoints
from dispersive_kit.training.shipped import shipped

FILE = "umap-digits.npz"
ARMS = {"base": "digits-base", "paper": "digits-paper"}
NEIGHBOURS, MIN_DIST, SEEDS = (5, 15, 50), (0.0, 0.1, 0.5), (0, 1)
IMAGES, LEVEL = 400, 2.0  # held-out digits, log-SNR
SHRUNK = 0.1  # factor on one class about its mean
STAGES = (100, 200, 400, 600)
TRUST = "aligned trust"

Grid = dict[str, NDArray[np.float16]]


def name_of(arm: str, neighbours: int, min_dist: float, seed: int) -> str:
    return f"{arm}/{neighbours}/{min_dist:g}/{seed}"


def last_block(model: DiT, data: ImageSet) -> Tensor:
    """Pooled features (N, D) after the last block at the level of the pictures."""
    return extract(pooled(model), data.images[:IMAGES], (LEVEL,))[0][0, -1]


def shrink(x: Tensor, labels: Tensor, label: int = 0, factor: float = SHRUNK) -> Tensor:
    """The same features with one class drawn together about its mean."""
    own, x = labels == label, x.clone()
    x[own] = x[own].mean(0) + factor * (x[own] - x[own].mean(0))
    return x


def clusters() -> tuple[Tensor, Tensor]:
    """Six round classes of 50 rows (300, 20), far apart, and their labels."""
    labels = torch.arange(300) % 6
    noise = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    return 8 * torch.eye(20)[labels] + noise, labels


def shrinkage() -> dict[str, projection.Array]:
    """UMAP and densMAP of the clusters, as they are and with class 0 drawn together."""
    x, labels = clusters()
    return {
        f"{kind}, {name}": projection.umap(z, dens=kind == "densmap")
        for kind in ("umap", "densmap")
        for name, z in (("wide", x), ("shrunk", shrink(x, labels)))
    }


def make(run: Path) -> Grid:
    """Every picture (N, 2): the grid for both arms, scale and shrinkage, densMAP, and AlignedUMAP over `run`.

    `TRUST` is that of each stage of the last (stages,).
    """
    data = load_images("digits", "test")
    features = {arm: last_block(load_run(shipped(name))[0], data) for arm, name in ARMS.items()}
    found = {
        name_of(arm, k, near, seed): projection.umap(x, neighbours=k, min_dist=near, seed=seed)
        for arm, x in features.items()
        for k in NEIGHBOURS
        for near in MIN_DIST
        for seed in SEEDS
    }
    found["umap, 8 X"] = projection.umap(8 * features["base"])
    found |= shrinkage()
    kept = {int(path.name.removeprefix("step-")) for path in checkpoints(run / "checkpoints")}
    if not set(STAGES) <= kept:
        raise DataError(f"{run} kept the steps {sorted(kept)}, and {STAGES} are needed")
    stages = [last_block(load_run(run, step=step)[0], data) for step in STAGES]
    drawn = projection.aligned_umap(stages)
    found |= {f"aligned/{step}": points for step, points in zip(STAGES, drawn, strict=True)}
    found[TRUST] = np.array([projection.trustworthiness(x, z) for x, z in zip(stages, drawn, strict=True)])
    return {name: points.astype(np.float16) for name, points in found.items()}


def build() -> None:
    """Train the run whose stages are shown, and write the file; some ten minutes on one core."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "digits"
        for _ in train(train_preset("digits", checkpoint_every=100, keep_last=6), run):
            pass
        np.savez_compressed(FOLDER / FILE, **make(run))  # type: ignore[arg-type]


def load() -> dict[str, projection.Array]:
    """The pictures (N, 2) of the package by name.

    Raises:
        DataError: the file is missing or damaged.
    """
    with np.load(artefact(FILE), allow_pickle=False) as file:
        return {name: file[name].astype(np.float64) for name in file.files}
