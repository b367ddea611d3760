"""Features in two dimensions: PCA, UMAP and its trustworthiness, and tokens as colours.

UMAP scales each point's neighbourhood to one size, so it hides dispersion (UMAP(X) = UMAP(8 X)): it shows
neighbours only. Dispersion is shown by histograms, spectra and numbers. umap is imported at first use (8 to 50 s).
"""

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dispersive_kit.analysis.geometry import centred, finite
from dispersive_kit.evaluation.distances import Array

CAPTION = "Only neighbours can be read: areas and distances say nothing about dispersion."


def pca(x: Tensor, k: int = 2) -> Array:
    """First k principal components (N, k) of rows (N, D); each axis points to its longer tail, so signs are stable."""
    rows = centred(x)
    _, _, axes = torch.linalg.svd(rows, full_matrices=False)
    found = rows @ axes[:k].T
    return (found * torch.where((found**3).sum(0) < 0, -1.0, 1.0)).numpy()


def picture_name(arm: str, neighbours: int, min_dist: float, seed: int) -> str:
    """The name of a UMAP in a shipped file, from its arm and its settings."""
    return f"{arm}/{neighbours}/{min_dist:g}/{seed}"


def umap(x: Tensor, *, neighbours: int = 15, min_dist: float = 0.1, seed: int = 0, dens: bool = False) -> Array:
    """UMAP (N, 2) of rows (N, D), or densMAP, which keeps some of the local density."""
    rows = finite(x).double().numpy()
    import umap

    reducer = umap.UMAP(n_neighbors=neighbours, min_dist=min_dist, random_state=seed, densmap=dens, n_jobs=1)
    with warnings.catch_warnings(action="ignore"):  # umap warns that a seed means one thread, which is what is wanted
        return np.asarray(reducer.fit_transform(rows), dtype=np.float64)


def aligned_umap(stages: Sequence[Tensor]) -> list[Array]:
    """One UMAP (N, 2) for each stage, of the same N images; neighbouring stages are aligned, to follow the points."""
    rows = [finite(x).double().numpy() for x in stages]
    import umap

    reducer = umap.AlignedUMAP(n_neighbors=15, min_dist=0.1, random_state=0)
    same = {i: i for i in range(len(stages[0]))}
    with warnings.catch_warnings(action="ignore"):
        reducer.fit(rows, relations=[same] * (len(stages) - 1))
    return [np.asarray(one, dtype=np.float64) for one in reducer.embeddings_]


def trustworthiness(x: Tensor, embedding: Array, neighbours: int = 15) -> float:
    """1 if every neighbour in the picture is one in the features (Venna & Kaski, 2001), about .5 at random."""
    from sklearn.manifold import trustworthiness as measure

    return float(measure(finite(x).double().numpy(), embedding, n_neighbors=neighbours))


def token_maps(tokens: Mapping[str, Tensor]) -> dict[str, Array]:
    """The first three components of tokens (B, N, D) as colours (B, G, G, 3) in [0, 1], with one basis for all.

    There is one basis and one scale, since separate ones would hide what images have in common. Use features of one
    network only: the axes of two networks are unrelated.
    """
    colours = pca(torch.cat([z.flatten(0, 1) for z in tokens.values()]), 3)
    low, high = np.percentile(colours, [1, 99], axis=0)
    scaled = torch.from_numpy(((colours - low) / np.maximum(high - low, 1e-12)).clip(0, 1))
    parts = zip(tokens, scaled.split([len(z) * z.shape[1] for z in tokens.values()]), strict=True)
    return {name: part.reshape(len(z := tokens[name]), math.isqrt(z.shape[1]), -1, 3).numpy() for name, part in parts}
