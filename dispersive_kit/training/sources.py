"""What a run trains on: a set of images or of 2-D points on the device, its held-out part, and its card."""

from dataclasses import dataclass
from typing import Any

import torch

from dispersive_kit.data import TOY_SETS, ImageSet, load_images, sample_toy
from dispersive_kit.training.config import TrainConfig
from dispersive_kit.training.draws import HELD_OUT, DeviceSet

TOY_POINTS = 50_000


@dataclass(frozen=True)
class Source:
    """`train` and `held_out` answer `batch(...)` as `DeviceSet` does; `card` goes into run.json.

    The card's `shape` (of one sample) and `classes` are enough to build the model again.
    """

    train: Any
    held_out: Any
    card: dict[str, Any]


def open_source(config: TrainConfig, device: torch.device | str = "cpu") -> Source:
    """The data named by `config.data`, on the device.

    Raises:
        DataError: it is not there, is damaged, or has no such name.
    """
    if config.data in TOY_SETS:
        return _points(config.data, device)
    train, held_out = (
        load_images(config.data, split, data_dir=config.data_dir, size=config.image_size) for split in ("train", "test")
    )
    return Source(DeviceSet.of(train, device), DeviceSet.of(held_out, device), describe_images(train))


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
