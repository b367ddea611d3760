"""The real images that samples of a run are held against."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dispersive_kit.data import ImageSet, load_images, to_uint8
from dispersive_kit.data.selection import Selection
from dispersive_kit.training.config import TrainConfig
from dispersive_kit.training.draws import stream
from dispersive_kit.training.latent_set import open_store

ROWS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Part(ImageSet):
    """Some images of a larger set of `drawn_from` images; the record of a number says so."""

    drawn_from: int


def draw_images(data: ImageSet, n: int, *, seed: int = 0) -> ImageSet:
    """n images of a set (all, where it has no more) in random order: as they come, sets may be sorted by class."""
    drawn = data.subset(torch.randperm(len(data), generator=stream(seed, "images"))[:n])
    return drawn if n >= len(data) else as_part(drawn, len(data))


def as_part(data: ImageSet, drawn_from: int) -> Part:
    return Part(**{field.name: getattr(data, field.name) for field in fields(ImageSet)}, drawn_from=drawn_from)


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
    found = ImageSet(f"{store.path.name}-decoded", data.part, images, labels, data.classes, str(store.path))
    return found if len(rows) == len(data) else as_part(found, len(data))
