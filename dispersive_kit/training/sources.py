"""What a run trains on: images or 2-D points on the device, or a store of latents; its held-out part, its card."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dispersive_kit.data import TOY_SETS, ImageSet, load_images, sample_toy
from dispersive_kit.data.images import BUNDLED_SETS, TORCHVISION_SETS
from dispersive_kit.data.latents import is_store
from dispersive_kit.errors import ConfigError
from dispersive_kit.training.config import TrainConfig
from dispersive_kit.training.draws import HELD_OUT, DeviceSet
from dispersive_kit.training.latent_set import LatentSet, describe_latents, open_store, verify_store

TOY_POINTS = 50_000


@dataclass(frozen=True)
class Source:
    """`train` and `held_out` answer `batch(...)` as `DeviceSet` does; `card` goes into run.json. `verify` reads all
    of a store of latents, and raises DataError if anything in it is not as it was written.

    The card's `shape` (of one sample) and `classes` are enough to build the model again.
    """

    train: Any
    held_out: Any
    card: dict[str, Any]
    verify: Callable[[], None] = lambda: None


def open_source(config: TrainConfig, device: torch.device | str = "cpu") -> Source:
    """The data named by `config.data`, on the device.

    Raises:
        DataError: it is not there, is damaged, or has no such name. ConfigError: see `open_store`;
            a share of anything but images, flips of points, or a size of anything but a folder of images.
    """
    if config.data_share < 1 and (is_store(config.data) or config.data in TOY_SETS):
        raise ConfigError(f"data_share is for sets of images, and {config.data!r} is none")
    own_size = is_store(config.data) or config.data in (*BUNDLED_SETS, *TORCHVISION_SETS, *TOY_SETS)
    if own_size and config.image_size != TrainConfig().image_size:
        raise ConfigError(f"image_size is for folders of images, and {config.data!r} has a size of its own")
    if config.flip and config.data in TOY_SETS:
        raise ConfigError(f"flip is for images, and {config.data!r} has points")
    if is_store(config.data):
        train, held_out = open_store(config)
        sets = LatentSet(train, device), LatentSet(held_out, device)
        return Source(*sets, describe_latents(train), partial(verify_store, train))
    if config.data in TOY_SETS:
        return _points(config.data, device)
    images, others = (
        load_images(config.data, split, data_dir=config.data_dir, size=config.image_size) for split in ("train", "test")
    )
    images = share_of(images, config.data_share)
    return Source(DeviceSet.of(images, device), DeviceSet.of(others, device), describe_images(images))


def share_of(images: ImageSet, share: float) -> ImageSet:
    """The first images of every class in the set's own order, a share of each, at least one: smaller shares lie
    within larger ones.
    """
    if share == 1:
        return images
    classes = [(images.labels == label).nonzero().flatten() for label in images.labels.unique()]
    kept = torch.cat([own[: max(1, round(share * len(own)))] for own in classes])
    return images.subset(kept.sort().values)


def describe_images(data: ImageSet) -> dict[str, Any]:
    return {
        "name": data.name,
        "source": data.source,
        "sha256": data.sha256,
        "samples": len(data),
        "shape": list(data.images.shape[1:]),
        "classes": list(data.classes),
    }


def _points(name: str, device: torch.device | str) -> Source:
    train, held_out = (
        DeviceSet(*(part.to(device) for part in sample_toy(name, n, seed=seed)))
        for n, seed in ((TOY_POINTS, 0), (HELD_OUT, 1))
    )
    card = {
        "name": name,
        "source": "dispersive_kit.data.toy",
        "sha256": train.sha256,
        "samples": TOY_POINTS,
        "shape": [2],
        "classes": [str(i) for i in range(int(train.labels.max()) + 1)],
    }
    return Source(train, held_out, card)
