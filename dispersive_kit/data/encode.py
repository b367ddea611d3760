"""Encode a folder of images once. A shard depends only on the plan: a kill or other processes do not change its bytes.

Process r of W makes those of the shards r, r + W, ... that are not finished, and then a record of each. A batch never
contains images of two shards, and PyTorch uses one CPU thread. spec.json is made from the records, and written last.
"""

import hashlib
import itertools
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass as checked
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from dispersive_kit.data.autoencoders import Autoencoder, load_autoencoder
from dispersive_kit.data.files import PARTIAL, atomic_write, list_folder, lock, notebook_stdout, read_form, write_json
from dispersive_kit.data.folder import ON_WHITE, ImageFile, ImageFolder, list_images, read_image
from dispersive_kit.data.images import to_float
from dispersive_kit.data.latents import PLAN, RECORDS, REPAIR, SPEC, LatentStore, ShardCard, Spec
from dispersive_kit.errors import ConfigError, DataError

IMAGENET_IMAGES = 1_281_167
READERS, READ_AHEAD = 4, 64  # threads that read and crop, and images read in advance
Progress = Callable[[int, int], None]  # of images done by all processes, and of all images


@checked(frozen=True)
class _Moments:
    """Of one shard: the number of values per channel, and the sums per channel of mean and of mean^2 + std^2."""

    count: int
    total: list[float]
    square: list[float]


@checked(frozen=True)
class _Record:
    card: ShardCard
    moments: _Moments
    class_counts: dict[str, int]
    odd: dict[str, int]
    left_out: list[dict[str, str]]


@dataclass(frozen=True)
class Encoder:
    """The settings of an encoding: images, autoencoder, store; ConfigError if a setting is not valid."""

    images: Path
    autoencoder: str
    store: Path
    image_size: int = 256  # side of ADM's centre crop
    flip: bool = True  # store mirror images too
    dtype: str = "float16"  # or bfloat16
    shard_size: int = 4096  # images
    batch_size: int = 32  # images through the autoencoder at once
    device: str = "cpu"

    def __post_init__(self) -> None:
        if min(sizes := (self.image_size, self.shard_size, self.batch_size)) < 1:
            raise ConfigError(f"image_size, shard_size and batch_size must be above 0, got {sizes}")
        if self.dtype not in ("float16", "bfloat16"):
            raise ConfigError(f"unknown dtype {self.dtype!r}; there are: float16, bfloat16")

    @cached_property
    def folder(self) -> ImageFolder:
        return list_images(self.images)

    @cached_property
    def loaded(self) -> Autoencoder:
        return load_autoencoder(self.autoencoder, device=self.device)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a latent (C, h, w), found by encoding and decoding one image."""
        return self.loaded.latent_shape(self.image_size)

    @cached_property
    def shards(self) -> dict[str, tuple[str, ...]]:
        """The images of each shard, by its name."""
        files, size = self.folder.files, self.shard_size
        return {f"shard-{i // size:05d}.safetensors": files[i : i + size] for i in range(0, len(files), size)}

    def finished(self) -> list[str]:
        """The shards that are in the store and have a record."""
        there = {path.name for folder in (self.store, self.store / RECORDS) for path in list_folder(folder)}
        return [shard for shard in self.shards if {shard, f"{shard}.json"} <= there]

    def done(self) -> int:
        return sum(len(self.shards[shard]) for shard in self.finished())

    @property
    def plan(self) -> dict[str, Any]:
        """All that the bytes depend on; the first part of spec.json."""
        folder, device = self.folder, torch.device(self.device).type
        return {
            "autoencoder": asdict(self.loaded.card),
            "images": {"root": str(self.images.resolve()), "files": len(folder.files), "names_sha256": folder.sha256},
            "image_size": self.image_size,
            "flip": self.flip,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "encoding": {"shard_size": self.shard_size, "batch_size": self.batch_size, "device": device},
            "classes": list(folder.classes),
        }

    def begin(self) -> None:
        """Write the plan, or compare it with the plan that is already there."""
        store, file, plan = self.store, self.store / RECORDS / PLAN, self.plan | {"transparency": ON_WHITE}
        if list_folder(store) not in ([], [file.parent]) and file not in list_folder(file.parent):
            raise ConfigError(f"{store} is not empty and holds no store of latents; choose another folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with lock(file.with_name("plan.lock")):
            if not file.exists():  # if two processes begin at once, one writes
                write_json(file, plan)
        begun = read_form(file, dict[str, Any], "Choose another folder")
        if changed := [f"{k}: {begun.get(k)!r:.200} -> {v!r:.200}" for k, v in plan.items() if begun.get(k) != v]:
            said = f"{store} was begun with other settings or images:\n  " + "\n  ".join(changed)
            raise ConfigError(f"{said}\nchoose another folder, or use the old settings and images")

    def make(self, shard: str, pool: ThreadPoolExecutor, progress: Progress) -> None:
        """Write a shard and then its record."""
        done, total, labels = self.done(), len(self.folder.files), list[int]()
        odd, left_out = Counter[str](), list[dict[str, str]]()

        def readable() -> Iterator[Tensor]:
            for image in self._read_ahead(pool, self.shards[shard]):
                if image.pixels is None:
                    left_out.append({"file": image.file, "fault": image.fault})
                else:
                    odd.update(image.oddities)
                    labels.append(self.folder.label(image.file))
                    yield image.pixels

        images, dtype = readable(), getattr(torch, self.dtype)
        parts = [torch.empty(0, 1 + self.flip, 2, *self.shape, dtype=dtype)]
        while batch := list(itertools.islice(images, self.batch_size)):
            parts.append(self._encode(torch.stack(batch), shard))
            progress(done + sum(map(len, parts)), total)
        posterior = torch.cat(parts)
        content = save({"posterior": posterior, "labels": torch.tensor(labels, dtype=torch.long)})
        with atomic_write(self.store / shard) as partial:
            partial.write_bytes(content)
        card = ShardCard(shard, len(labels), len(content), hashlib.sha256(content).hexdigest())
        counts = Counter(self.folder.classes[label] for label in labels)
        record = _Record(card, _moments(posterior), counts, odd, left_out)
        write_json(self.store / RECORDS / f"{shard}.json", asdict(record))

    def _read_ahead(self, pool: ThreadPoolExecutor, files: tuple[str, ...]) -> Iterator[ImageFile]:
        """Images in the order of `files`, with at most READ_AHEAD read and waiting."""
        pending: deque[Future[ImageFile]] = deque()
        for file in files:
            pending.append(pool.submit(read_image, self.images, file, self.image_size))
            if len(pending) >= READ_AHEAD:
                yield pending.popleft().result()
        yield from (one.result() for one in pending)

    def _encode(self, pixels: Tensor, shard: str) -> Tensor:
        """Posteriors (n, flips, 2, C, h, w) on the CPU, in the type of the store."""
        x = to_float(pixels).to(self.device)
        found = torch.stack([self.loaded.posterior(way) for way in ([x, x.flip(-1)] if self.flip else [x])], dim=1)
        stored = found.to(getattr(torch, self.dtype)).cpu()
        if not found.isfinite().all():
            raise DataError(f"the autoencoder gives NaN or infinity for an image of {shard}")
        if not stored.isfinite().all():
            raise DataError(f"latents of {shard} exceed {self.dtype}: use --dtype bfloat16, with the range of float32")
        return stored

    def finish(self) -> None:
        """Write spec.json from the records of all shards, unless it has this content already."""
        records = [read_form(self.store / RECORDS / f"{shard}.json", _Record, REPAIR) for shard in self.shards]
        if not any(record.card.rows for record in records):
            raise DataError(f"none of the {len(self.folder.files)} files below {self.images} can be read")
        odd = sum((Counter(record.odd) for record in records), Counter[str]())
        counts = sum((Counter(record.class_counts) for record in records), Counter[str]())
        mean, std = _mean_and_std([record.moments for record in records])
        fields = self.plan | {"channel_mean": mean, "channel_std": std, "shards": [record.card for record in records]}
        left_out = [photo for record in records for photo in record.left_out]
        fields["images"] |= {"odd": dict(sorted(odd.items())), "left_out": left_out}
        fields["class_counts"] = [counts[name] for name in self.folder.classes]
        text, file = Spec(**fields).to_json(), self.store / SPEC
        if not file.exists() or file.read_text() != text:
            with atomic_write(file) as partial:
                partial.write_text(text)
        for leftover in self.store.rglob(f"{PARTIAL}*"):
            leftover.unlink(missing_ok=True)


def encode(encoder: Encoder, *, part: tuple[int, int] = (0, 1), progress: Progress | None = None) -> LatentStore | None:
    """Encode a folder of images, or continue. Call 0 waits for the others and returns the store; they return None.

    part: (number of this call from 0, number of calls), where a launcher has started several, on one or more machines.
    progress: called after each batch of this process, and while it waits for others; None: a progress bar.
    Raises ConfigError: the store was begun with other settings. DataError: no images, or none that can be read; latents
        that are not finite; a full disk, or one that cannot be read; the autoencoder is not found.
    """
    encoder.begin()
    (number, calls), total = part, len(encoder.folder.files)
    how: Any = {"unit": "image", "mininterval": 0.1 if sys.stderr.isatty() else 60, "file": notebook_stdout()}
    bar = tqdm(total=total, initial=encoder.done(), disable=bool(number or progress), **how)
    progress = progress or (lambda now, _: bar.update(now - bar.n) and None)
    pool, threads = ThreadPoolExecutor(READERS), torch.get_num_threads()
    torch.set_num_threads(1)  # sums on a CPU may depend on it, and sums on a GPU on the algorithm
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            finished = encoder.finished()
            for shard in list(encoder.shards)[number::calls]:
                if shard not in finished:
                    encoder.make(shard, pool, progress)
    finally:
        torch.set_num_threads(threads)
        pool.shutdown(cancel_futures=True)  # pending reads would wait for a disk that fails
    if number > 0:
        return None
    while encoder.done() < total:
        time.sleep(0.2)
        progress(encoder.done(), total)
    encoder.finish()
    return LatentStore(encoder.store)


def _moments(posterior: Tensor) -> _Moments:
    """Moments of posteriors (n, flips, 2, C, h, w)."""
    sums = []
    for part in posterior.split(256):
        mean, std = part.double().unbind(2)  # (n, flips, C, h, w)
        sums.append([x.sum((0, 1, 3, 4)).tolist() for x in (mean, mean.square() + std.square())])
    total, square = ([math.fsum(channel) for channel in zip(*parts, strict=True)] for parts in zip(*sums, strict=True))
    return _Moments(posterior[:, :, 0, 0].numel(), total, square)


def _mean_and_std(moments: list[_Moments]) -> tuple[list[float], list[float]]:
    """Per channel, of draws from the posteriors with these moments; fsum does not depend on their order."""
    count, sums = sum(one.count for one in moments), zip(*((one.total, one.square) for one in moments), strict=True)
    mean, square = ([math.fsum(channel) / count for channel in zip(*parts, strict=True)] for parts in sums)
    return mean, [math.sqrt(max(s - m**2, 0.0)) for s, m in zip(square, mean, strict=True)]


def store_size(images: int, shape: tuple[int, ...], *, flip: bool = True, shard_size: int = 4096) -> tuple[int, str]:
    """Computed size in bytes of a store of `images` latents of shape (C, h, w), and the same in words."""
    each = 2 * (1 + flip) * math.prod(shape) * 2 + 8  # mean and std, of the mirror image too, in 16 bits; the label
    shards = math.ceil(images / shard_size)
    total = images * each + shards * 168  # about the bytes of a safetensors header
    return total, (
        f"{images:,} images {'with' if flip else 'without'} mirror images, latents {'x'.join(map(str, shape))}: "
        f"{each:,} bytes each, {total / 1e6:,.1f} MB in {shards:,} shards of at most {shard_size * each / 1e6:,.1f} MB"
    )
