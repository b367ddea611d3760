"""The real images that samples of a run are held against."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dispersive_kit.data import ImageSet, load_images, to_uint8
from dispersive_kit.data.selection import Selection
from dispersive_kit.training.config import TrainConfig
from dispersive_kit.training.latent_set import open_store

ROWS_AT_ONCE = 64


def load_reference(
    config: TrainConfig, decode: Callable[[Tensor], Tensor] | None = None, *, at_most: int = 2000
) -> tuple[ImageSet, ImageSet]:
    """Training and held-out images of a run's configuration.

    decode: of a run on latents, see `decoder_of`. There the images are at most so many posterior means, decoded:
    samples go through the same decoder, so what the autoencoder loses is on both sides. They are named "...-decoded".

    Raises:
        DataError, ConfigError: the data is missing or damaged; see `open_store`.
    """
    if decode is None:
        options: dict[str, Any] = {"data_dir": config.data_dir, "size": config.image_size}
        return load_images(config.data, "train", **options), load_images(config.data, "test", **options)
    train, held_out = open_store(config)
    return _images(train, decode, at_most), _images(held_out, decode, at_most)


def _images(data: Selection, decode: Callable[[Tensor], Tensor], at_most: int) -> ImageSet:
    store, rows = data.store, data.rows(np.arange(min(at_most, len(data))))
    to_model = store.spec.autoencoder.to_model
    parts = np.array_split(rows, -(-len(rows) // ROWS_AT_ONCE))
    images = torch.cat([to_uint8(decode(to_model(store.read(part)[:, 0].float()))) for part in parts])
    labels = torch.from_numpy(data.labels(rows))
    return ImageSet(f"{store.path.name}-decoded", data.part, images, labels, data.classes, str(store.path))
