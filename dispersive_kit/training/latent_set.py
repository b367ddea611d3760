"""A store of latents as a run is fed from it: rows from the disk, draws and scale on the device."""

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dispersive_kit.data.autoencoders import load_autoencoder, refuse_other
from dispersive_kit.data.latents import LatentStore, Selection
from dispersive_kit.errors import ConfigError, DataError
from dispersive_kit.training.config import TrainConfig
from dispersive_kit.training.draws import Batch, drop_labels, stream


@dataclass(frozen=True)
class LatentSet:
    """A selection of a store: rows are read from the disk, draws from their posteriors are made on the device.

    Of an image and its mirror image only the one wanted is read, so which it is, is decided here and not there.
    """

    selection: Selection
    device: torch.device | str

    def __len__(self) -> int:
        return len(self.selection)

    def batch(
        self,
        objective: Any,
        *,
        seed: int,
        step: int,
        size: int,
        null_label: int | None,
        drop_prob: float,
        flip: bool = False,
    ) -> Batch:
        """The global batch of one step; the same whatever device count, arm or accumulation asks for it."""
        rows = self.selection.draw(seed, step, size)
        mirrored = torch.rand(size, generator=stream(seed, "flip", step)).numpy() < 0.5 if flip else None
        generator = stream(seed, "batch", step, self.device)
        x0 = self._sample(self.selection.store.read(rows, mirrored), generator)
        labels = torch.from_numpy(self.selection.store.labels(rows)).to(self.device)
        y = drop_labels(labels, null_label, drop_prob, generator)
        return Batch(x0, y, labels, objective.draw(x0, generator))

    def _sample(self, posterior: Tensor, generator: torch.Generator) -> Tensor:
        if torch.device(self.device).type == "cuda":
            posterior = posterior.pin_memory()  # from other memory a copy would wait for all that the GPU has to do
        mean, std = posterior.to(self.device, non_blocking=True).float().unbind(1)  # (B, C, h, w)
        noise = torch.randn(mean.shape, generator=generator, device=self.device)
        return self.selection.store.spec.autoencoder.to_model(mean + std * noise)


def open_store(config: TrainConfig) -> tuple[Selection, Selection]:
    """The training and the held-out part of the store that `config.data` names.

    Raises:
        DataError: damaged. ConfigError: mirror images asked of a store that has none.
    """
    store = LatentStore(config.data)
    if config.flip and not store.spec.flip:
        raise ConfigError(f"{store.path} holds no mirror images: train with flip off, or encode with --flip")
    train = Selection(store)
    return train, Selection(store, "test")


def verify_store(data: Selection) -> None:
    """Before training: every checksum of a store, and its autoencoder, if that is on this machine.

    Raises:
        DataError: a damaged shard, or an autoencoder that is not the one the latents were made with; by name.
    """
    data.store.verify()
    card = data.store.spec.autoencoder
    try:
        found = load_autoencoder(card.id, download=False).card
    except DataError as missing:
        warnings.warn(f"training goes on, but its samples cannot be decoded here: {missing}", stacklevel=2)
    else:
        refuse_other(found, card)


def describe_latents(data: Selection) -> dict[str, Any]:
    """What run.json keeps: enough to build the model again, and to decode its samples."""
    spec = data.store.spec
    return {
        "name": data.store.path.name,
        "source": str(data.store.path.resolve()),
        "sha256": spec.sha256,
        "samples": len(data),
        "shape": list(spec.shape),
        "classes": list(spec.classes),
        "autoencoder": asdict(spec.autoencoder),
    }
