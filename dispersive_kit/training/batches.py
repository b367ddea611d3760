"""The training data by name, and all random numbers as a function of (seed, step, global sample index).

Each process draws the whole global batch from a generator seeded by (seed, step), and takes its rows. So the numbers
do not depend on the split, a run resumes without generator state, and two arms get the same images and noise.
"""

import hashlib
import json
import warnings
from abc import abstractmethod
from collections.abc import Sized
from dataclasses import asdict
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dispersive_kit.data import TOY_SETS, ImageSet, load_images, sample_toy, to_float
from dispersive_kit.data.autoencoders import load_autoencoder, refuse_other
from dispersive_kit.data.images import is_named_set
from dispersive_kit.data.latents import LatentStore, Selection, is_store
from dispersive_kit.errors import ConfigError, DataError
from dispersive_kit.training.config import TrainConfig

HELD_OUT = 512  # samples at most in the frozen batch of the held-out loss
TOY_POINTS = 50_000


def stream(seed: int, name: str, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A separate random generator for one purpose (`name`) at one step."""
    digest = hashlib.blake2b(f"{seed}/{name}/{step}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=stream(seed, "order", epoch))


def sample_index(seed: int, step: int, batch_size: int, n: int) -> Tensor:
    """Indices (batch_size,) into a set of n that step `step` trains on: each epoch is one permutation."""
    position = torch.arange(step * batch_size, (step + 1) * batch_size)
    epoch = position // n
    orders = [_epoch_order(seed, int(e), n)[position[epoch == e] % n] for e in range(int(epoch[0]), int(epoch[-1]) + 1)]
    return torch.cat(orders)


class Batch(NamedTuple):
    """Samples x0 (B, ...), images in [-1, 1]; labels y (B,), some dropped to the null class; the objective's draws."""

    x0: Tensor
    y: Tensor
    draws: Any
    condition: Tensor  # y, with a different negative number for each dropped label: it equals no other

    def rows(self, part: int, parts: int) -> "Batch":
        """The `part`-th of `parts` equal slices."""
        size = len(self.x0) // parts
        return Batch(*(one[part * size : (part + 1) * size] for one in self))


class _TrainingSet(Sized):
    """A data set from which global batches are drawn; `device`: where the batches are."""

    device: torch.device

    @abstractmethod
    def draw(self, seed: int, step: int, size: int, flip: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x0 (B, ...) and labels (B,) of one step; `generator` is the step's own."""

    def batch(
        self,
        objective: Any,
        *,
        seed: int,
        step: int,
        size: int,
        null_label: int | None = None,
        drop_prob: float = 0.0,
        flip: bool = False,
    ) -> Batch:
        """The global batch of one step. null_label: the class that replaces dropped labels; None: none is dropped."""
        generator = stream(seed, "batch", step, self.device)
        x0, y = self.draw(seed, step, size, flip, generator)
        condition = y
        if null_label is not None:
            dropped = torch.rand(y.shape, generator=generator, device=y.device) < drop_prob
            condition = torch.where(dropped, -1 - torch.arange(size, device=y.device), y)
            y = torch.where(dropped, null_label, y)
        return Batch(x0, y, objective.draw(x0, generator), condition)

    def frozen_batch(self, objective: Any, size: int = HELD_OUT) -> Batch:
        """At most `size` samples with their t and eps: the same for every run, arm and step."""
        return self.batch(objective, seed=0, step=0, size=min(size, len(self)))


class DeviceSet(_TrainingSet):
    """A small set, kept completely on the device, without a loader: images uint8 (N, C, H, W), or points (N, 2)."""

    def __init__(self, samples: Tensor, labels: Tensor, device: torch.device | str = "cpu") -> None:
        self.samples, self.labels, self.device = samples.to(device), labels.to(device), torch.device(device)
        self.shape = samples.shape[1:]

    @classmethod
    def of(cls, data: ImageSet, device: torch.device | str = "cpu") -> "DeviceSet":
        return cls(data.images, data.labels, device)

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(self.samples.cpu().numpy().tobytes())
        digest.update(self.labels.cpu().numpy().tobytes())
        return digest.hexdigest()

    def draw(self, seed: int, step: int, size: int, flip: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = sample_index(seed, step, size, len(self)).to(self.device)
        x0 = self.samples[index]
        if flip:  # flipped as bytes, which is a quarter of the float32 memory
            mirrored = torch.rand(size, generator=generator, device=self.device) < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        return to_float(x0) if x0.dtype == torch.uint8 else x0, self.labels[index]


class LatentSet(_TrainingSet):
    """A part of a store. Posteriors of images, or of mirror images, are read from disk; latents are drawn from them."""

    def __init__(self, selection: Selection, device: torch.device | str = "cpu") -> None:
        self.selection, self.device = selection, torch.device(device)
        self.shape, self.sha256 = selection.store.spec.shape, selection.store.spec.sha256

    def __len__(self) -> int:
        return len(self.selection)

    def draw(self, seed: int, step: int, size: int, flip: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows, store = self.selection.draw(seed, step, size), self.selection.store
        mirrored = torch.rand(size, generator=stream(seed, "flip", step)).numpy() < 0.5 if flip else None
        posterior = store.read(rows, mirrored)
        if self.device.type == "cuda":
            posterior = posterior.pin_memory()  # a copy from unpinned memory would wait for the GPU's queue
        mean, std = posterior.to(self.device, non_blocking=True).float().unbind(1)  # (B, C, h, w)
        noise = torch.randn(mean.shape, generator=generator, device=self.device)
        labels = torch.from_numpy(store.labels(rows)).to(self.device)
        return store.spec.autoencoder.to_model(mean + std * noise), labels

    def verify(self) -> None:
        """Check all checksums of the store, and its autoencoder if it is on this machine."""
        self.selection.store.verify()
        card = self.selection.store.spec.autoencoder
        try:
            found = load_autoencoder(card.id, download=False).card
        except DataError as missing:
            warnings.warn(f"training continues, but its samples cannot be decoded here: {missing}", stacklevel=2)
        else:
            refuse_other(found, card)


class _Source(NamedTuple):
    """The data of a run, and their card for run.json, from which the model can be rebuilt."""

    train: DeviceSet | LatentSet
    held_out: DeviceSet | LatentSet
    card: dict[str, Any]  # all_sha256: of both sets and of the class names
    validation: DeviceSet | None  # images that `data_share` leaves out, for early stopping


def open_source(config: TrainConfig, device: torch.device | str = "cpu") -> _Source:
    """The data named by `config.data`, on the device.

    Raises DataError: the data are missing or damaged, or the name is unknown. ConfigError: `flip` for points or for a
        store without mirror images; `data_share` for points or a store; `image_size` for a named set or a store.
    """
    named = is_named_set(config.data)  # first of all, since a folder may have the same name
    name, points, store = config.data, config.data in TOY_SETS, is_store(config.data)
    if config.data_share < 1 and (store or points):
        raise ConfigError(f"data_share is for sets of images, not for {name!r}")
    if (named or store) and config.image_size != TrainConfig().image_size:
        raise ConfigError(f"image_size is for folders of images; {name!r} has a fixed size")
    if config.flip and points:
        raise ConfigError(f"flip is for images; {name!r} holds points")
    validation, beside = None, {}
    if store:
        parts: list[Any] = [LatentSet(part, device) for part in open_store(name, flip=config.flip)]
        opened = parts[0].selection.store
        name, source, classes = opened.path.name, str(opened.path.resolve()), opened.spec.classes
        beside = {"autoencoder": asdict(opened.spec.autoencoder)}  # to decode the run's samples
    elif points:
        parts = [DeviceSet(*sample_toy(name, n, seed=seed), device) for n, seed in ((TOY_POINTS, 0), (HELD_OUT, 1))]
        source, classes = "dispersive_kit.data.toy", tuple(map(str, range(int(parts[0].labels.max()) + 1)))
    else:
        images, others = (
            load_images(name, split, data_dir=config.data_dir, size=config.image_size) for split in ("train", "test")
        )
        images, left_out = split_share(images, config.data_share)
        parts = [DeviceSet.of(one, device) for one in (images, others)]
        validation = DeviceSet.of(left_out, device) if left_out else None
        name, source, classes = images.name, images.source, images.classes
    train, held_out = parts
    both = hashlib.sha256(json.dumps([train.sha256, held_out.sha256, *classes]).encode()).hexdigest()
    card = {"name": name, "source": source, "sha256": train.sha256, "all_sha256": both, "samples": len(train)}
    card |= {"shape": list(train.shape), "classes": list(classes), **beside}
    return _Source(train, held_out, card, validation)


def split_share(images: ImageSet, share: float) -> tuple[ImageSet, ImageSet | None]:
    """Training images: the first `share` of every class, at least one image each. Validation images, to choose a step:
    the last of the others, at most `HELD_OUT` or one of every class. A smaller share is a part of a larger one.
    """
    if share == 1:
        return images, None
    classes = [(images.labels == label).nonzero().flatten() for label in images.labels.unique()]
    cuts = [max(1, round(share * len(own))) for own in classes]
    most = max(1, HELD_OUT // len(classes))
    kept = torch.cat([own[:cut] for own, cut in zip(classes, cuts, strict=True)])
    left = torch.cat([own[cut:][-most:] for own, cut in zip(classes, cuts, strict=True)])
    return images.subset(kept.sort().values), images.subset(left.sort().values) if len(left) else None


def open_store(path: str, *, flip: bool = False) -> tuple[Selection, Selection]:
    """The training and the held-out part of a store. Raises ConfigError: `flip`, and it has no mirror images."""
    store = LatentStore(path)
    if flip and not store.spec.flip:
        raise ConfigError(f"{store.path} holds no mirror images: train with flip off, or encode with --flip")
    return Selection(store), Selection(store, "test")
