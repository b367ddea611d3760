"""Samples in the form other tool chains read and write."""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from dispersive_kit.errors import DataError


def save_npz(images: Tensor, file: Path) -> None:
    """Write uint8 (N, C, H, W) as `arr_0` uint8 (N, H, W, C): the form of ADM's evaluation suite."""
    np.savez(file, images.permute(0, 2, 3, 1).numpy())


def load_npz(file: Path) -> Tensor:
    """The samples `arr_0` uint8 (N, H, W, C) of a file, as uint8 (N, C, H, W).

    Raises:
        DataError: no such file, or no such samples in it.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images = arrays["arr_0"]
    except (OSError, KeyError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise DataError(f"{file} holds no samples (an array arr_0): {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DataError(f"{file}: arr_0 must be uint8 (N, H, W, 1 or 3), got {images.dtype} {images.shape}")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
