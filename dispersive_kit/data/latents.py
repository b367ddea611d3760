"""A store of latents: shards of posterior mean and std in safetensors, spec.json, which describes them, and records/.

A row of `posterior` (n, flips, 2, C, h, w) holds mean and std of the raw latents of an image and of its mirror image,
so a training step reads one place per image. Shards are memory-mapped: the processes of a machine share their pages.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, NonNegativeInt
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from dispersive_kit.data.autoencoders import Autoencoder, AutoencoderCard
from dispersive_kit.data.files import file_sha256, list_folder, read_form, reading
from dispersive_kit.data.images import to_uint8
from dispersive_kit.errors import DataError

SPEC, RECORDS, PLAN = "spec.json", "records", "plan.json"
REPAIR = "Delete it and give the encode command again, which makes only what is missing"
HELD_OUT_ROWS = 512  # at most, and at most a tenth of all rows; for ImageNet this is 0.04 %
EXACT = ConfigDict(extra="forbid")
Rows = NDArray[np.int64]


@dataclass(frozen=True, config=EXACT)
class ShardCard:
    file: Annotated[str, Field(pattern=r"^shard-\d+\.safetensors$")]  # in the folder of the spec only
    rows: NonNegativeInt
    bytes: int
    sha256: str


@dataclass(frozen=True, config=EXACT, kw_only=True)
class Spec:
    """All that is needed to train on a store and to turn samples back into images."""

    format: Literal["dispersive_kit latents 1"] = "dispersive_kit latents 1"
    autoencoder: AutoencoderCard
    images: dict[str, Any]  # root, number, hash of the names, how many were odd, and which were left out and why
    image_size: int  # side of ADM's centre crop
    flip: bool  # whether mirror images are stored too
    shape: tuple[int, int, int]  # of one latent (C, h, w)
    dtype: Literal["float16", "bfloat16"]  # of the values stored
    encoding: dict[str, Any]  # batch size and device, on which the last bits depend
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]  # rows of each
    channel_mean: tuple[float, ...]  # of the raw latents, over all rows, places and draws from the posterior
    channel_std: tuple[float, ...]
    shards: tuple[ShardCard, ...]
    spec_sha256: str = ""  # as it was written

    @property
    def sha256(self) -> str:
        """Hash of all fields; these include the checksums of the shards."""
        told = {name: value for name, value in asdict(self).items() if name not in ("format", "spec_sha256")}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"spec_sha256": self.sha256}, indent=2)


def is_store(path: str | Path) -> bool:
    """Whether `path` is a folder in which latents were, or are being, stored."""
    below = [*list_folder(Path(path)), *list_folder(Path(path) / RECORDS)]
    return any(file in below for file in (Path(path) / SPEC, Path(path) / RECORDS / PLAN))


class LatentStore:
    """A finished store, open for reading; DataError if its spec, file sizes or headers show that it is damaged."""

    def __init__(self, path: str | Path) -> None:
        self.path, file = Path(path), Path(path) / SPEC
        if file not in list_folder(self.path):
            said = "is not finished: give the same encode command again" if is_store(path) else "is no store of latents"
            raise DataError(f"{path} {said} (no {SPEC})")
        self.spec = spec = read_form(file, Spec, cure=REPAIR)
        if spec.spec_sha256 != spec.sha256:
            raise DataError(
                f"{file} is damaged: it was changed after it was written (scale, shift, classes, ... belong to the "
                f"shards). It now says scale {spec.autoencoder.scale} and shift {spec.autoencoder.shift}. {REPAIR}"
            )
        opened = [_map_shard(self.path, shard, spec) for shard in spec.shards]
        self._posteriors = [shard["posterior"].view(torch.int16).numpy() for shard in opened]  # faster row by row
        self._labels = [shard["labels"].numpy() for shard in opened]
        self._starts = np.cumsum([0, *(shard.rows for shard in spec.shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, rows: Rows, flipped: NDArray[np.bool_] | None = None) -> Tensor:
        """Mean and std (B, 2, C, h, w) of these rows, in the type stored; of the mirror images where `flipped`."""
        version = np.zeros(len(rows), dtype=int) if flipped is None else flipped.astype(int)
        read = np.empty((len(rows), 2, *self.spec.shape), dtype=np.int16)
        for out, (shard, row), v in zip(read, self._places(rows), version.tolist(), strict=True):
            out[...] = self._posteriors[shard][row, v]
        return torch.from_numpy(read).view(getattr(torch, self.spec.dtype))

    def labels(self, rows: Rows) -> Rows:
        """Class numbers (B,) of these rows."""
        return np.array([self._labels[shard][row] for shard, row in self._places(rows)], dtype=np.int64)

    def verify(self) -> None:
        """Read every shard and compare its checksum with the spec; DataError names those that are damaged."""
        shards, title = self.spec.shards, f"verifying {self.path.name}"
        with ThreadPoolExecutor(8) as pool, reading(self.path):
            hashes = pool.map(lambda shard: file_sha256(self.path / shard.file), shards)
            found = list(tqdm(hashes, title, len(shards), leave=False, disable=None))  # None: on a terminal only
        if faults := [s.file for s, digest in zip(shards, found, strict=True) if digest != s.sha256]:
            raise DataError(f"{self.path}: {', '.join(faults)} damaged: the sha256 is not the one in {SPEC}. {REPAIR}")

    def check(self) -> Iterator[str]:
        """Verify the checksums, and yield lines that say what the store contains."""
        spec = self.spec
        self.verify()
        yield f"checksums of {len(spec.shards)} shards"
        yield f"{len(self):,} rows of {len(spec.classes)} classes, {len(spec.images['left_out'])} files left out"

    def decoded_grid(self, autoencoder: Autoencoder) -> Tensor:
        """Posterior means of rows spread over the store, decoded: uint8 (16 or fewer, 3, H, W)."""
        rows = _shuffled(np.arange(min(16, len(self))), len(self), _key("grid"))
        return to_uint8(autoencoder.images(autoencoder.card.to_model(self.read(rows)[:, 0].float())))

    def _places(self, rows: Rows) -> Iterator[tuple[int, int]]:
        """(shard, row within it) of each row."""
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        return zip(shard.tolist(), (rows - self._starts[shard]).tolist(), strict=True)


def _map_shard(folder: Path, shard: ShardCard, spec: Spec) -> dict[str, Tensor]:
    """`posterior` and `labels` of one file, as memory-mapped tensors."""
    file, row = folder / shard.file, (1 + spec.flip, 2, *spec.shape)
    wanted = {"posterior": (getattr(torch, spec.dtype), (shard.rows, *row)), "labels": (torch.int64, (shard.rows,))}
    try:
        with reading(file):
            if not file.is_file():
                raise DataError(f"{file} is missing. Give the encode command again")
            if (size := file.stat().st_size) != shard.bytes:
                raise DataError(f"{file} is truncated: {size} bytes, and {SPEC} says {shard.bytes}. {REPAIR}")
            found = load_file(file)
        if {name: (x.dtype, tuple(x.shape)) for name, x in found.items()} != wanted:
            raise ValueError(f"it does not hold {wanted}")
    except (SafetensorError, ValueError) as error:
        raise DataError(f"{file} is damaged ({type(error).__name__}: {error}). {REPAIR}") from error
    return found


class Selection:
    """The training part ("train") or the held-out part ("test") of a store, and the order of its rows.

    The first rows of one fixed shuffle are held out, for every seed; DataError if the store has too few rows.
    """

    def __init__(self, store: LatentStore, part: str = "train") -> None:
        held_out = min(HELD_OUT_ROWS, len(store) // 10)
        if held_out == 0:
            raise DataError(f"{store.path}: {len(store)} rows are too few to hold out a tenth of them")
        self.store, self.part = store, part
        self._first, self._count = (0, held_out) if part == "test" else (held_out, len(store) - held_out)

    def __len__(self) -> int:
        return self._count

    def rows(self, index: Rows) -> Rows:
        """Row numbers in the store of `index` in 0..len - 1."""
        return _shuffled(self._first + index, len(self.store), _key("split"))

    def draw(self, seed: int, step: int, size: int) -> Rows:
        """The rows (size,) of one step: each epoch is one permutation of the selection."""
        epoch, place = np.divmod(np.arange(step * size, (step + 1) * size), self._count)
        return self.rows(_shuffled(place, self._count, _mix(_key(seed, "order") + _mix(epoch.astype(np.uint64)))))


def _key(*parts: object) -> NDArray[np.uint64]:
    """A 63-bit key (1,)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return np.array([int.from_bytes(digest, "little") >> 1], dtype=np.uint64)


def _shuffled(position: Rows, n: int, key: NDArray[np.uint64]) -> Rows:
    """The new places of `position` (B,) in a permutation of 0..n-1, chosen by `key`: one key for all, or one for each.

    The swap-or-not shuffle: in each round x has a partner K - x mod n, and one bit, drawn for the pair, decides whether
    the two are swapped. Hoang, Morris & Rogaway (arXiv 1208.1176). torch.randperm would need 10 MB for ImageNet, draw
    all of it for a step in the middle of an epoch, and change the rows that older runs held out.
    """
    x, size = position.astype(np.uint64), np.uint64(n)
    for number in range(32):
        round_key = _mix(key + np.uint64(number + 1))
        partner = (round_key % size + size - x) % size
        swaps = _mix(np.maximum(x, partner) ^ (round_key << np.uint64(1))) & np.uint64(1)
        x = np.where(swaps == 1, partner, x)
    return x.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele et al. 2014); unsigned overflow is intended."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
