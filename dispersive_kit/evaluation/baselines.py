"""Generative models so cheap that a trained one must beat them."""

import numpy as np
import torch
from torch import Tensor

from dispersive_kit.data import ImageSet


def pixel_gaussian(train: ImageSet, n: int, *, seed: int = 0) -> Tensor:
    """n uint8 images (n, C, H, W) from one Gaussian fitted to the training pixels, all classes together."""
    flat = train.images.flatten(1).double().numpy()  # (N, C H W)
    rng = np.random.default_rng(seed)
    draws = rng.multivariate_normal(flat.mean(0), np.cov(flat.T), n, method="eigh")
    return torch.from_numpy(draws.round().clip(0, 255).astype(np.uint8)).reshape(n, *train.images.shape[1:])
