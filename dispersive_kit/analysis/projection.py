"""Two dimensions of many: PCA, UMAP and how far it may be trusted, and tokens as colours.

UMAP scales each point's neighbourhood to one size, so it is blind to dispersion (UMAP(X) = UMAP(8 X)): it shows
neighbours only. Dispersion is shown by histograms, spectra and numbers. umap is imported at first use (8 to 50 s).
"""

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dispersive_kit.analysis.geometry import centred, finite

CAPTION = "Only neighbours can be read: areas and distances say nothing about dispersion."
Array = NDArray[np.float64]


def pca(x: Tensor, k: int = 2) -> Array:
    """First k principal components (N, k) of rows (N, D); each axis points to its longer tail, so signs are stable."""
    rows = centred(x)
    _, _, axes = torch.linalg.svd(rows, full_matrices=False)
    found = rows @ axes[:k].T
    return (found * torch.where((found**3).sum(0) < 0, -1.0, 1.0)).numpy()


def picture_name(arm: str, neighbours: int, min_dist: float, seed: int) -> str:
    """Of a UMAP in a shipped file: of an arm, and at one setting."""
    return f"{arm}/{neighbours}/{min_dist:g}/{seed}"


def umap(x: Tensor, *, neighbours: int = 15, min_dist: float = 0.1, seed: int = 0, dens: bool = False) -> Array:
    """UMAP (N, 2) of rows (N, D), or densMAP, which keeps some of the local density."""
    rows = finite(x).double().numpy()
    import umap

    reducer = umap.UMAP(n_neighbors=neighbours, min_dist=min_dist, random_state=seed, densmap=dens, n_jobs=1)
    with warnings.catch_warnings():  # umap warns that a seed means one thread, which is what is wanted
        warnings.simplefilter("ignore")
        return np.asarray(reducer.fit_transform(rows), dtype=np.float64)


def aligned_umap(stages: Sequence[Tensor]) -> list[Array]:
    """One UMAP (N, 2) a stage for the same N images at each, held near each other so that points can be followed."""
    rows = [finite(x).double().numpy() for x in stages]
    import umap

    reducer = umap.AlignedUMAP(n_neighbors=15, min_dist=0.1, random_state=0)
    same = {i: i for i in range(len(stages[0]))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reducer.fit(rows, relations=[same] * (len(stages) - 1))
    return [np.asarray(one, dtype=np.float64) for one in reducer.embeddings_]


def trustworthiness(x: Tensor, embedding: Array, neighbours: int = 15) -> float:
    """1 if every neighbour in the picture is one in the features (Venna & Kaski, 2001), about .5 at random."""
    from sklearn.manifold import trustworthiness as measure

    return float(measure(finite(x).double().numpy(), embedding, n_neighbors=neighbours))


def token_maps(tokens: Mapping[str, Tensor]) -> dict[str, Array]:
    """The first three components of tokens (B, N, D) as colours (B, G, G, 3) in [0, 1], with one basis for all.

    One basis and one scale: a map of its own for each image would hide what they share. Only for features of one
    network: the axes of two have nothing to do with each other.
    """
    colours = pca(torch.cat([z.flatten(0, 1) for z in tokens.values()]), 3)
    low, high = np.percentile(colours, [1, 99], axis=0)
    scaled = torch.from_numpy(((colours - low) / np.maximum(high - low, 1e-12)).clip(0, 1))
    parts = zip(tokens, scaled.split([len(z) * z.shape[1] for z in tokens.values()]), strict=True)
    return {name: part.reshape(len(z := tokens[name]), math.isqrt(z.shape[1]), -1, 3).numpy() for name, part in parts}
