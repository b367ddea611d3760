"""One process at work on a store of latents: the plan, one shard after the other, and the spec."""

import contextlib
import hashlib
import itertools
import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dispersive_kit.data.autoencoders import Autoencoder, load_autoencoder
from dispersive_kit.data.files import atomic_write, lock
from dispersive_kit.data.image_folder import ImageFile, ImageFolder, list_images, read_image
from dispersive_kit.data.images import to_float
from dispersive_kit.data.latents import (
    DTYPES,
    PLAN,
    RECORDS,
    SPEC,
    Moments,
    ShardCard,
    Spec,
    read_spec,
)
from dispersive_kit.errors import ConfigError, DataError, KitError

POLL_S = 0.2  # between looks at shards that other processes are at
LOOK_S = 1.0  # at most so often all shards are looked at for the progress shown


@dataclass(frozen=True)
class EncodeConfig:
    """What is encoded, and how. All but `readers`, `strict` and the place decide the bytes of the store."""

    images: Path
    autoencoder: str
    store: Path
    image_size: int = 256  # side of ADM's centre crop
    flip: bool = True  # store mirror images too
    dtype: str = "float16"  # or bfloat16
    shard_size: int = 4096  # images
    batch_size: int = 32  # images through the autoencoder at once
    strict: bool = False  # a file that cannot be read ends the command, and is not left out
    readers: int = 4  # threads that read and crop images ahead of the autoencoder
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("image_size", "shard_size", "batch_size", "readers"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}; there are: {', '.join(DTYPES)}")


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, and what was met on the way."""

    card: ShardCard
    moments: Moments
    class_counts: dict[str, int]
    odd: dict[str, int]
    left_out: list[dict[str, str]]

    @classmethod
    def read(cls, file: Path) -> "ShardRecord":
        fields = json.loads(file.read_text())
        return cls(**{**fields, "card": ShardCard(**fields["card"]), "moments": Moments(**fields["moments"])})


@dataclass
class Met:
    """What was met while a shard was read."""

    labels: list[int] = field(default_factory=list)
    odd: Counter[str] = field(default_factory=Counter)
    left_out: list[dict[str, str]] = field(default_factory=list)


class Encoder:
    """One process at work on a store.

    Raises:
        DataError: no images, or the autoencoder is not there.
    """

    def __init__(self, config: EncodeConfig) -> None:
        self.config = config
        self.on_batch: Callable[[Encoder], None] = lambda encoder: None
        self._finished: set[str] = set()
        self._looked_at = -math.inf
        self.in_hand = 0  # images of the shard this process is at that went through the autoencoder
        self.folder: ImageFolder = list_images(config.images)
        self.autoencoder: Autoencoder = load_autoencoder(config.autoencoder, device=config.device)
        self.records = config.store / RECORDS
        blank = torch.zeros(1, 3, config.image_size, config.image_size, device=config.device)
        try:
            self.shape: tuple[int, ...] = tuple(self.autoencoder.posterior(blank).shape[2:])  # (C, h, w)
        except RuntimeError as error:
            raise ConfigError(f"images of {config.image_size} pixels are too small for this autoencoder") from error
        if config.image_size % self.shape[-1]:
            raise ConfigError(
                f"image_size {config.image_size} gives latents of {self.shape[-1]}, which is no whole part of it: take "
                "a multiple of what the autoencoder divides by"
            )

    @cached_property
    def shards(self) -> list[str]:
        return [f"shard-{i:05d}.safetensors" for i in range(-(-len(self.folder.files) // self.config.shard_size))]

    @property
    def plan(self) -> dict[str, Any]:
        """What decides the bytes; the head of spec.json."""
        config = self.config
        device = torch.device(config.device).type
        return {
            "autoencoder": asdict(self.autoencoder.card),
            "images": {
                "root": str(config.images.resolve()),
                "files": len(self.folder.files),
                "names_sha256": self.folder.sha256,
            },
            "image_size": config.image_size,
            "flip": config.flip,
            "shape": list(self.shape),
            "dtype": config.dtype,
            "encoding": {"shard_size": config.shard_size, "batch_size": config.batch_size, "device": device},
            "classes": list(self.folder.classes),
        }

    def begin(self) -> None:
        """Write the plan, or compare it with that of the process that was first."""
        folder, file = self.config.store, self.records / PLAN
        if folder.exists() and any(path != self.records for path in folder.iterdir()) and not file.exists():
            raise ConfigError(f"{folder} is not empty and holds no store that was begun; choose another folder")
        self.records.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            with lock(self.records / "plan.lock"):
                if not file.exists():  # of two that begin at once, one writes
                    _write(file, json.dumps(self.plan, indent=2).encode())
        begun = json.loads(file.read_text())
        if changed := [f"{k}: {short(begun[k])} -> {short(v)}" for k, v in self.plan.items() if begun[k] != v]:
            raise ConfigError(
                f"{folder} was begun with other settings or images, and cannot be gone on with:\n  "
                + "\n  ".join(changed)
                + "\nchoose another folder, or go back to the old ones"
            )

    def finished(self, shard: str) -> bool:
        """Whether any process has; once seen, it is not looked up again."""
        if shard not in self._finished:
            there = (self.records / f"{shard}.json").is_file() and (self.config.store / shard).is_file()
            self._finished.update([shard] if there else [])
        return shard in self._finished

    def unfinished(self) -> list[str]:
        self._looked_at = time.monotonic()
        return [shard for shard in self.shards if not self.finished(shard)]

    @property
    def done(self) -> int:
        """Images in the shards that any process has finished, and in the one this process is at."""
        if time.monotonic() - self._looked_at > LOOK_S:  # hundreds of files, perhaps over a network
            self.unfinished()
        missing = self.shards[-1] in self._finished and -len(self.folder.files) % self.config.shard_size
        return self.in_hand + len(self._finished) * self.config.shard_size - missing

    def work(self) -> None:
        """Make the shards that nobody else is at, until all are finished."""
        pool = ThreadPoolExecutor(self.config.readers)
        try:
            with one_thread():
                while waiting := self.unfinished():
                    if not self._make_some(waiting, pool):
                        self.on_batch(self)  # others are at work, and this process shows it
                        time.sleep(POLL_S)
        finally:
            pool.shutdown(cancel_futures=True)  # a disk that is away would let each of them wait

    def _make_some(self, waiting: list[str], pool: ThreadPoolExecutor) -> int:
        made = 0
        for shard in waiting:
            try:
                with lock(self.records / f"{shard}.lock", busy="another process makes it", error=_BusyError):
                    if not self.finished(shard):
                        self._make(shard, pool)
                        made += 1
            except _BusyError:
                continue
        return made

    def _make(self, shard: str, pool: ThreadPoolExecutor) -> None:
        """Encode one shard, and write it and its record."""
        first = self.shards.index(shard) * self.config.shard_size
        files = self.folder.files[first : first + self.config.shard_size]
        met = Met()
        readable = self._readable(read_ahead(pool, self._read, files), met)
        parts = [self._encode(batch) for batch in batches(readable, self.config.batch_size)]
        row = (1 + self.config.flip, 2, *self.shape)
        posterior = torch.cat([torch.empty(0, *row, dtype=getattr(torch, self.config.dtype)), *parts])
        content = save({"posterior": posterior, "labels": torch.tensor(met.labels, dtype=torch.long)})
        _write(self.config.store / shard, content)
        card = ShardCard(shard, len(met.labels), len(content), hashlib.sha256(content).hexdigest())
        counts = Counter(self.folder.classes[label] for label in met.labels)
        record = ShardRecord(card, Moments.of(posterior), dict(counts), dict(met.odd), met.left_out)
        _write(self.records / f"{shard}.json", json.dumps(asdict(record), sort_keys=True).encode())
        self.in_hand = 0
        self.finished(shard)

    def _read(self, file: str) -> ImageFile:
        return read_image(self.config.images, file, self.config.image_size)

    def _readable(self, images: Iterable[ImageFile], met: "Met") -> Iterator[ImageFile]:
        """Those that can be encoded; what was met is kept in `met`."""
        for image in images:
            if image.pixels is None:
                met.left_out.append(self._leave_out(image))
            else:
                met.odd.update(image.oddities)
                met.labels.append(self.folder.label(image.file))
                yield image

    def _leave_out(self, image: ImageFile) -> dict[str, str]:
        if self.config.strict:
            raise DataError(
                f"{self.config.images / image.file} cannot be read ({image.fault}); repair or remove it, "
                "or go on without --strict, which leaves it out and lists it"
            )
        return {"file": image.file, "fault": image.fault}

    def _encode(self, batch: list[ImageFile]) -> Tensor:
        """Posteriors (n, flips, 2, C, h, w) on the CPU, in the type of the store."""
        x = to_float(torch.stack([image.pixels for image in batch if image.pixels is not None])).to(self.config.device)
        versions = [x, x.flip(-1)] if self.config.flip else [x]
        encoded = torch.stack([self.autoencoder.posterior(version) for version in versions], dim=1)
        stored = encoded.to(getattr(torch, self.config.dtype)).cpu()
        if not stored.isfinite().all():
            raise DataError(
                f"the latents of {batch[0].file} .. {batch[-1].file} are not finite as {self.config.dtype}; "
                "try --dtype bfloat16, which has the range of float32"
            )
        self.in_hand += len(batch)
        self.on_batch(self)
        return stored

    def finish(self) -> Spec:
        """Write spec.json from the records of all shards, unless it says just that already.

        Raises:
            DataError: not one image could be read; with `strict`, an earlier command left one out.
        """
        records = [ShardRecord.read(self.records / f"{shard}.json") for shard in self.shards]
        if self.config.strict:
            for photo in itertools.chain.from_iterable(record.left_out for record in records):
                self._leave_out(ImageFile(photo["file"], None, fault=photo["fault"]))
        file, content = self.config.store / SPEC, self._spec(records).to_json()
        with lock(self.records / "finish.lock"):
            if not file.is_file() or file.read_bytes() != content.encode():
                _write(file, content.encode())
            for leftover in [*self.records.glob("*.lock"), *self.config.store.rglob(".partial-*")]:
                leftover.unlink(missing_ok=True)
        return read_spec(self.config.store)

    def _spec(self, records: list[ShardRecord]) -> Spec:
        moments = Moments.joined(record.moments for record in records)
        if moments.count == 0:
            raise DataError(f"not one of the {len(self.folder.files)} files below {self.config.images} can be read")
        odd = sum((Counter(record.odd) for record in records), Counter[str]())
        counts = sum((Counter(record.class_counts) for record in records), Counter[str]())
        left_out = [photo for record in records for photo in record.left_out]
        plan = self.plan
        images = {**plan["images"], "odd": dict(sorted(odd.items())), "left_out": left_out}
        return Spec(
            autoencoder=self.autoencoder.card,
            images=images,
            image_size=self.config.image_size,
            flip=self.config.flip,
            shape=self.shape,  # type: ignore[arg-type]
            dtype=self.config.dtype,
            encoding=plan["encoding"],
            classes=self.folder.classes,
            class_counts=tuple(counts[name] for name in self.folder.classes),
            channel_mean=moments.mean,
            channel_std=moments.std,
            shards=tuple(record.card for record in records),
        )


class _BusyError(KitError):
    pass


def _write(file: Path, content: bytes) -> None:
    with atomic_write(file) as partial:
        partial.write_bytes(content)


def short(value: Any, most: int = 200) -> str:
    """For a message: a thousand classes are not read by anybody."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def batches(images: Iterable[ImageFile], size: int) -> Iterator[list[ImageFile]]:
    stream = iter(images)
    while batch := list(itertools.islice(stream, size)):
        yield batch


def read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[str], ImageFile], files: Iterable[str], depth: int = 64
) -> Iterator[ImageFile]:
    """Images in the order of `files`, with at most `depth` read and waiting."""
    pending: deque[Future[ImageFile]] = deque()
    for file in files:
        pending.append(pool.submit(read, file))
        if len(pending) >= depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums of a CPU may depend on the number of threads, and those of a GPU on which algorithm was fastest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(threads)
