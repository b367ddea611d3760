"""Samples in the form other tool chains read."""

from pathlib import Path

import numpy as np
from torch import Tensor


def save_npz(images: Tensor, file: Path) -> None:
    """Write uint8 (N, C, H, W) as `arr_0` uint8 (N, H, W, C): the form of ADM's evaluation suite."""
    np.savez(file, images.permute(0, 2, 3, 1).numpy())
