"""What a probe reads without any network: the pixels, and principal components of patches.

Encoders as those of `features.py`, with one "block", so that they see the same images under the same noise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dispersive_kit.analysis.features import Encoder
from dispersive_kit.data import to_float


def raw_pixels(x: Tensor, t: Tensor, where: slice) -> Tensor:
    """x_t flattened: (1, B, C H W)."""
    return x.flatten(1)[None]


def patch_pca(images: Tensor, patch_size: int, k: int) -> Encoder:
    """First k principal components of patches, and their squares, each as the mean over patches: (1, B, 2 k).

    Fitted on clean uint8 training images (N, C, H, W). The means alone would tell the mean patch and no more; squares
    are the simplest thing that does.
    """
    patches = cut(to_float(images), patch_size).flatten(0, 1).double()  # (N patches, C p p)
    mean = patches.mean(0)
    _, axes = torch.linalg.eigh((patches - mean).T @ (patches - mean))
    basis = axes[:, -k:]  # (C p p, k)

    def encode(x: Tensor, t: Tensor, where: slice) -> Tensor:
        found = (cut(x, patch_size).double() - mean) @ basis  # (B, patches, k)
        return torch.cat([found.mean(1), found.square().mean(1)], 1)[None]

    return encode


def cut(x: Tensor, patch_size: int) -> Tensor:
    """Patches (B, patches, C p p)."""
    return F.unfold(x, patch_size, stride=patch_size).mT
