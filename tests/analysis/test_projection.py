"""Projections: scale-blindness shown, trust measured, one basis for all maps."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from dispersive_kit.analysis import projection


def clusters(shrunk: float = 1.0, n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clusters in 10 dimensions, the first `shrunk` times as wide."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3 * n) % 3
    width = torch.where(y == 0, shrunk, 1.0)[:, None]
    return 8 * torch.eye(10)[y] + width * torch.randn(3 * n, 10, generator=g), y


def test_pca_is_scikit_learns_up_to_signs():
    x, _ = clusters()
    theirs = PCA(2).fit_transform(x.double().numpy())
    assert np.allclose(np.abs(projection.pca(x)), np.abs(theirs), atol=1e-8)
    assert np.allclose(projection.pca(x), projection.pca(x.flip(0))[::-1])


def test_maps_share_one_basis_and_one_scale():
    z = torch.randn(4, 16, 6, generator=torch.Generator().manual_seed(0))
    maps = projection.token_maps({"a": z, "b": z[:2]})
    assert maps["a"].shape == (4, 4, 4, 3) and maps["a"].min() >= 0 and maps["a"].max() <= 1
    assert np.array_equal(maps["a"][:2], maps["b"])


def test_trust_is_one_for_the_features_themselves_and_a_half_for_noise():
    x, _ = clusters()
    noise = np.random.default_rng(0).normal(size=(len(x), 2))
    assert projection.trustworthiness(x[:, :2], x[:, :2].numpy()) == pytest.approx(1)
    assert projection.trustworthiness(x, noise) < 0.65


def radius(points: np.ndarray, y: torch.Tensor) -> float:
    """Of class 0, over that of all points."""
    return float((points[(y == 0).numpy()].var(0).sum() / points.var(0).sum()) ** 0.5)


@pytest.mark.long  # numba compiles for 20 s; that UMAP is blind to scale is asserted by notebook 11
def test_densmap_sees_a_class_that_shrank_and_umap_does_not():
    (x, y), (small, _) = clusters(n=100), clusters(0.1, n=100)
    plain, dens = (
        radius(projection.umap(small, dens=d), y) / radius(projection.umap(x, dens=d), y) for d in (False, True)
    )
    assert dens < 0.7 < plain
