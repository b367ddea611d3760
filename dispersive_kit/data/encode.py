"""Encode a folder of images once: a shard is a function of the plan, so a kill or company changes no bit of a store.

Of W processes the r-th makes the shards r, r + W, ... that are not finished, and then a record of each. A batch never
crosses a shard, and on a CPU each process has one thread. spec.json is put together from the records, and comes last.
"""

import hashlib
import itertools
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from dispersive_kit.data.autoencoders import load_autoencoder
from dispersive_kit.data.files import atomic_write, lock, read_json, write_json
from dispersive_kit.data.folder import ImageFile, list_images, read_image
from dispersive_kit.data.images import to_float
from dispersive_kit.data.latents import PLAN, RECORDS, SPEC, LatentStore, ShardCard, Spec, mean_and_std, moments
from dispersive_kit.errors import ConfigError, DataError

IMAGENET_IMAGES = 1_281_167
READERS, READ_AHEAD = 4, 64  # threads that read and crop, and images that wait for the autoencoder
Progress = Callable[[int, int], None]  # of images done by all processes, and of all images


@dataclass(frozen=True)
class EncodeConfig:
    """What is encoded, and how. All but `strict` and the place decide the bytes of the store."""

    images: Path
    autoencoder: str
    store: Path
    image_size: int = 256  # side of ADM's centre crop
    flip: bool = True  # store mirror images too
    dtype: str = "float16"  # or bfloat16
    shard_size: int = 4096  # images
    batch_size: int = 32  # images through the autoencoder at once
    strict: bool = False  # a file that cannot be read ends the command, and is not left out
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("image_size", "shard_size", "batch_size"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.dtype not in ("float16", "bfloat16"):
            raise ConfigError(f"unknown dtype {self.dtype!r}; there are: float16, bfloat16")


class Encoder:
    """One process at work on a store.

    Raises:
        DataError: no images, or the autoencoder is not there. ConfigError: a size that it cannot take.
    """

    def __init__(self, config: EncodeConfig) -> None:
        self.config = config
        self.folder = list_images(config.images)
        self.autoencoder = load_autoencoder(config.autoencoder, device=config.device)
        self.records = config.store / RECORDS
        blank = torch.zeros(1, 3, config.image_size, config.image_size, device=config.device)
        try:
            self.shape: tuple[int, ...] = tuple(self.autoencoder.posterior(blank).shape[2:])  # (C, h, w)
        except RuntimeError as error:
            raise ConfigError(f"images of {config.image_size} pixels are too small for this autoencoder") from error
        if config.image_size % (side := self.shape[-1]):
            raise ConfigError(
                f"image_size {config.image_size} gives latents of {side}, which is no whole part of it: take a "
                "multiple of what the autoencoder divides by"
            )
        self.total = len(self.folder.files)
        self.bytes, self.size = store_size(self.total, self.shape, flip=config.flip, shard_size=config.shard_size)
        self.shards = [f"shard-{i:05d}.safetensors" for i in range(math.ceil(self.total / config.shard_size))]

    @property
    def plan(self) -> dict[str, Any]:
        """What decides the bytes; the head of spec.json."""
        config, folder, device = self.config, self.folder, torch.device(self.config.device).type
        return {
            "autoencoder": asdict(self.autoencoder.card),
            "images": {"root": str(config.images.resolve()), "files": len(folder.files), "names_sha256": folder.sha256},
            "image_size": config.image_size,
            "flip": config.flip,
            "shape": list(self.shape),
            "dtype": config.dtype,
            "encoding": {"shard_size": config.shard_size, "batch_size": config.batch_size, "device": device},
            "classes": list(folder.classes),
        }

    def begin(self) -> None:
        """Write the plan, or compare it with that of the process that was first."""
        folder, file = self.config.store, self.records / PLAN
        if folder.exists() and any(path != self.records for path in folder.iterdir()) and not file.exists():
            raise ConfigError(f"{folder} is not empty and holds no store that was begun; choose another folder")
        self.records.mkdir(parents=True, exist_ok=True)
        with lock(self.records / "plan.lock"):
            if not file.exists():  # of two that begin at once, one writes
                write_json(file, self.plan)
        begun = read_json(file)
        if changed := [f"{k}: {begun.get(k)!r:.200} -> {v!r:.200}" for k, v in self.plan.items() if begun.get(k) != v]:
            raise ConfigError(
                f"{folder} was begun with other settings or images, and cannot be gone on with:\n  "
                + "\n  ".join(changed)
                + "\nchoose another folder, or go back to the old ones"
            )

    def finished(self, shard: str) -> bool:
        return (self.records / f"{shard}.json").is_file() and (self.config.store / shard).is_file()

    def done(self) -> int:
        """Images in the shards that are finished."""
        size = self.config.shard_size
        return sum(min(size, self.total - i * size) for i, shard in enumerate(self.shards) if self.finished(shard))

    def work(self, number: int, of: int, progress: Progress) -> None:
        """Make what is not finished of the shards `number`, `number` + `of`, ..."""
        pool, threads = ThreadPoolExecutor(READERS), torch.get_num_threads()
        torch.set_num_threads(1)  # on which sums of a CPU may depend, as on a GPU on which algorithm was fastest
        try:
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
                for shard in self.shards[number::of]:
                    if not self.finished(shard):
                        self._make(shard, pool, progress)
        finally:
            torch.set_num_threads(threads)
            pool.shutdown(cancel_futures=True)  # a disk that is away would let each of them wait

    def _make(self, shard: str, pool: ThreadPoolExecutor, progress: Progress) -> None:
        config, first, done = self.config, self.shards.index(shard) * self.config.shard_size, self.done()
        labels: list[int] = []
        odd: Counter[str] = Counter()
        left_out: list[dict[str, str]] = []

        def readable() -> Iterator[ImageFile]:
            for image in self._read_ahead(pool, self.folder.files[first : first + config.shard_size]):
                if image.pixels is None:
                    left_out.append(self._leave_out(image.file, image.fault))
                else:
                    odd.update(image.oddities)
                    labels.append(self.folder.label(image.file))
                    yield image

        images = readable()
        parts = [torch.empty(0, 1 + config.flip, 2, *self.shape, dtype=getattr(torch, config.dtype))]
        while batch := list(itertools.islice(images, config.batch_size)):
            parts.append(self._encode(batch))
            progress(done + sum(map(len, parts)), self.total)
        posterior = torch.cat(parts)
        content = save({"posterior": posterior, "labels": torch.tensor(labels, dtype=torch.long)})
        with atomic_write(config.store / shard) as partial:
            partial.write_bytes(content)
        record = {
            "card": asdict(ShardCard(shard, len(labels), len(content), hashlib.sha256(content).hexdigest())),
            "moments": moments(posterior),
            "class_counts": Counter(self.folder.classes[label] for label in labels),
            "odd": odd,
            "left_out": left_out,
        }
        write_json(self.records / f"{shard}.json", record)

    def _read_ahead(self, pool: ThreadPoolExecutor, files: tuple[str, ...]) -> Iterator[ImageFile]:
        """Images in the order of `files`, with at most READ_AHEAD read and waiting."""
        pending: deque[Future[ImageFile]] = deque()
        for file in files:
            pending.append(pool.submit(read_image, self.config.images, file, self.config.image_size))
            if len(pending) >= READ_AHEAD:
                yield pending.popleft().result()
        yield from (one.result() for one in pending)

    def _leave_out(self, file: str, fault: str) -> dict[str, str]:
        if self.config.strict:
            raise DataError(
                f"{self.config.images / file} cannot be read ({fault}); repair or remove it, "
                "or go on without --strict, which leaves it out and lists it"
            )
        return {"file": file, "fault": fault}

    def _encode(self, batch: list[ImageFile]) -> Tensor:
        """Posteriors (n, flips, 2, C, h, w) on the CPU, in the type of the store."""
        x = to_float(torch.stack([image.pixels for image in batch if image.pixels is not None])).to(self.config.device)
        ways = [x, x.flip(-1)] if self.config.flip else [x]
        found = torch.stack([self.autoencoder.posterior(way) for way in ways], dim=1)
        stored = found.to(getattr(torch, self.config.dtype)).cpu()
        if not stored.isfinite().all():
            raise DataError(
                f"the latents of {batch[0].file} .. {batch[-1].file} are not finite as {self.config.dtype}; "
                "try --dtype bfloat16, which has the range of float32"
            )
        return stored

    def finish(self) -> None:
        """Write spec.json from the records of all shards, unless it says just that already.

        Raises:
            DataError: not one image could be read; with `strict`, an earlier command left one out.
        """
        records = [read_json(self.records / f"{shard}.json") for shard in self.shards]
        left_out = [self._leave_out(**photo) for record in records for photo in record["left_out"]]
        if not any(record["card"]["rows"] for record in records):
            raise DataError(f"not one of the {len(self.folder.files)} files below {self.config.images} can be read")
        odd, counts = (sum((Counter(one[kind]) for one in records), Counter()) for kind in ("odd", "class_counts"))
        mean, std = mean_and_std(record["moments"] for record in records)
        fields = self.plan
        fields["images"] |= {"odd": dict(sorted(odd.items())), "left_out": left_out}
        fields |= {"channel_mean": mean, "channel_std": std, "shards": [record["card"] for record in records]}
        fields["class_counts"] = [counts[name] for name in self.folder.classes]
        spec = TypeAdapter(Spec).validate_python(fields)
        file = self.config.store / SPEC
        if not file.is_file() or file.read_text() != spec.to_json():
            with atomic_write(file) as partial:
                partial.write_text(spec.to_json())
        for leftover in self.config.store.rglob(".partial-*"):
            leftover.unlink(missing_ok=True)


def encode(
    encoder: Encoder, *, processes: int = 1, part: tuple[int, int] = (0, 1), progress: Progress | None = None
) -> LatentStore | None:
    """Encode a folder of images, or go on with it.

    Args:
        processes: on this machine, on its GPUs in turn; one: this process. part: which of how many such calls this is,
            where a launcher has started several, on one or more machines. progress: called after each batch of this
            process, or each second; a bar if not given.

    Returns:
        The store; None from all calls but the first, which waits for them.

    Raises:
        ConfigError: the store was begun with other settings. DataError: a damaged image with `strict`; no readable
            image at all; latents that are not finite; a full disk; a process that failed.
    """
    encoder.begin()
    (number, calls), total = part, encoder.total
    progress = progress or _bar(total, encoder.done(), hidden=number > 0)
    if processes == 1:
        encoder.work(number, calls, progress)
    else:
        _spawn(encoder, processes, number * processes, calls * processes, progress)
    if number > 0:
        return None
    while calls > 1 and encoder.done() < total:
        time.sleep(0.2)
        progress(encoder.done(), total)
    encoder.finish()
    return LatentStore(encoder.config.store)


def _spawn(encoder: Encoder, processes: int, first: int, of: int, progress: Progress) -> None:
    from torch.multiprocessing.spawn import ProcessException, spawn

    # torch has them end with this process, however it ends
    workers = spawn(_work, (encoder.config, first, of), processes, join=False, daemon=True)
    try:
        while not workers.join(timeout=1):
            progress(encoder.done(), encoder.total)
        progress(encoder.done(), encoder.total)
    except ProcessException as error:
        raise DataError(
            f"one of {processes} processes failed: {str(error).strip().splitlines()[-1]}. What is finished stays: put "
            "it right, and give the command again"
        ) from error
    finally:
        for process in workers.processes:
            process.terminate()


def _work(turn: int, config: EncodeConfig, first: int, of: int) -> None:
    if config.device.startswith("cuda"):
        config = replace(config, device=f"cuda:{turn % torch.cuda.device_count()}")
    Encoder(config).work(first + turn, of, lambda done, total: None)


def _bar(total: int, done: int, *, hidden: bool) -> Progress:
    """Images done, rate and time left, in a file once a minute; what an earlier command did is not in the rate."""
    seconds = 0.1 if sys.stderr.isatty() else 60
    bar = tqdm(total=total, initial=done, unit="image", mininterval=seconds, disable=hidden)
    return lambda now, total: bar.update(now - bar.n) and None


def store_size(images: int, shape: tuple[int, ...], *, flip: bool = True, shard_size: int = 4096) -> tuple[int, str]:
    """Bytes of a store of so many latents of this shape (C, h, w), by arithmetic alone, and the same in words."""
    each = 2 * (1 + flip) * math.prod(shape) * 2 + 8  # mean and std, of the mirror image too, in 16 bits; the label
    shards = math.ceil(images / shard_size)
    total = images * each + shards * 168  # of a safetensors header, to within a few
    return total, (
        f"{images:,} images {'with' if flip else 'without'} mirror images, latents {'x'.join(map(str, shape))}: "
        f"{each:,} bytes each, {total / 1e6:,.1f} MB in {shards:,} shards of at most {shard_size * each / 1e6:,.1f} MB"
    )
