"""A store of latents: safetensors shards of posterior mean and std, and a spec.json that says what they are.

    STORE/spec.json                 autoencoder, scale, crop, counts, statistics, checksums; written last
    STORE/shard-00000.safetensors   posterior (n, flips, 2, C, h, w), labels (n,)
    STORE/records/                  what encoding left: the plan, and a record of each shard

A row of `posterior` holds, for the image and then for its mirror image, mean and std of the raw latents: one reading
of one place gives all that a training step needs of an image. The shards are memory-mapped: what is read stays in
the page cache, which all processes of a machine share, and nothing of the store is copied into this process.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dispersive_kit.data.autoencoders import AutoencoderCard
from dispersive_kit.data.files import file_sha256
from dispersive_kit.errors import DataError

FORMAT = "dispersive_kit latents 1"
SPEC, RECORDS, PLAN = "spec.json", "records", "plan.json"
REPAIR = "Delete it and give the encode command again, which makes only what is missing"
ROWS_AT_ONCE = 256
# Type of the values in the shards -> (as safetensors writes it, as numpy reads it: numpy has no bfloat16)
DTYPES: dict[str, tuple[str, type]] = {"float16": ("F16", np.float16), "bfloat16": ("BF16", np.int16)}


@dataclass(frozen=True)
class ShardCard:
    """One file of the store."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Spec:
    """What a store is: all that is needed to train on it and to turn samples back into images.

    Attributes:
        images: of the folder: root, number, hash of the names, how many were odd, and each that was left out and why.
        image_size: side of ADM's centre crop. flip: whether mirror images are stored beside the images.
        shape: of one latent (C, h, w). dtype: of the values stored. class_counts: rows of each class.
        channel_mean, channel_std: of the raw latents, over all rows, places and draws from the posterior.
        encoding: batch size and device, on which the last bits depend.
    """

    autoencoder: AutoencoderCard
    images: dict[str, Any]
    image_size: int
    flip: bool
    shape: tuple[int, int, int]
    dtype: str
    encoding: dict[str, Any]
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    shards: tuple[ShardCard, ...]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(flips, 2, C, h, w)."""
        return (1 + self.flip, 2, *self.shape)

    @property
    def sha256(self) -> str:
        """Of everything in it, the shards' checksums among them: names the store."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self), "spec_sha256": self.sha256}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Spec":
        fields = json.loads(text)
        if fields.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        written = fields.pop("spec_sha256")
        lists = ("shape", "classes", "class_counts", "channel_mean", "channel_std")
        spec = cls(
            **{
                **fields,
                **{name: tuple(fields[name]) for name in lists},
                "autoencoder": AutoencoderCard(**fields["autoencoder"]),
                "shards": tuple(ShardCard(**shard) for shard in fields["shards"]),
            }
        )
        if spec.sha256 != written:
            raise ValueError(
                "it was changed after it was written (scale, shift, classes, ... belong to the shards). "
                f"It now says scale {spec.autoencoder.scale} and shift {spec.autoencoder.shift}"
            )
        return spec


def is_store(path: str | Path) -> bool:
    """Whether `path` is a folder in which latents were, or are being, stored."""
    return (Path(path) / SPEC).is_file() or (Path(path) / RECORDS / PLAN).is_file()


def read_spec(store: Path) -> Spec:
    """The spec of a finished store.

    Raises:
        DataError: none is there, or it is truncated or was edited.
    """
    try:
        return Spec.from_json((store / SPEC).read_text())
    except FileNotFoundError as error:
        state = "is not finished: give the same encode command again" if is_store(store) else "is no store of latents"
        raise DataError(f"{store} {state} (no {SPEC})") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{store / SPEC} is damaged: {error}. {REPAIR}") from error


class LatentStore:
    """A finished store, open for reading; rows are counted through all shards.

    Opening it looks at the header and the length of every shard; `verify` reads them whole.

    Raises:
        DataError: the spec or a shard is missing, truncated or does not fit the spec; the message names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.spec = read_spec(self.path)
        opened = [_map_shard(self.path, shard, self.spec) for shard in self.spec.shards]
        self._posteriors, self._labels = ([pair[i] for pair in opened] for i in (0, 1))
        self._starts = np.cumsum([0, *(shard.rows for shard in self.spec.shards)])

    def __len__(self) -> int:
        return self.spec.rows

    def read(self, rows: NDArray[np.int64], flipped: NDArray[np.bool_] | None = None) -> Tensor:
        """Mean and std (B, 2, C, h, w) of these rows, in the type stored; of the mirror images where `flipped`."""
        shard, row = self._find(rows)
        version = np.zeros(len(rows), dtype=int) if flipped is None else flipped.astype(int)
        numbers: NDArray[Any] = np.empty((len(rows), 2, *self.spec.shape), DTYPES[self.spec.dtype][1])
        for out, s, r, v in zip(numbers, shard.tolist(), row.tolist(), version.tolist(), strict=True):
            out[...] = self._posteriors[s][r, v]
        return torch.from_numpy(numbers).view(getattr(torch, self.spec.dtype))

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Class numbers (B,) of these rows."""
        shard, row = self._find(rows)
        return np.array([self._labels[s][r] for s, r in zip(shard, row, strict=True)], dtype=np.int64)

    def blocks(self) -> Iterator[Tensor]:
        """All posteriors (n, flips, 2, C, h, w), shard after shard, some rows at a time."""
        for shard in self._posteriors:
            for start in range(0, len(shard), ROWS_AT_ONCE):
                block = torch.from_numpy(np.array(shard[start : start + ROWS_AT_ONCE]))
                yield block.view(getattr(torch, self.spec.dtype))

    def all_labels(self) -> NDArray[np.int64]:
        """Class numbers of all rows: 8 bytes a row, so only where classes are chosen or balanced."""
        return np.concatenate(self._labels)

    def verify(self, *, workers: int = 8) -> None:
        """Read every shard and compare its checksum with the spec.

        Raises:
            DataError: naming every shard that is damaged.
        """
        with ThreadPoolExecutor(workers) as pool:
            hashes = pool.map(lambda shard: file_sha256(self.path / shard.file), self.spec.shards)
            title, number = f"verifying {self.path.name}", len(self.spec.shards)
            bar = tqdm(hashes, title, number, unit="shard", leave=False, disable=None)
            found = list(bar)  # tens of GB take minutes; disable=None: shown on a terminal only
        faults = [s.file for s, digest in zip(self.spec.shards, found, strict=True) if digest != s.sha256]
        if faults:
            raise DataError(f"{self.path}: {', '.join(faults)} damaged: the sha256 is not the one in {SPEC}. {REPAIR}")

    def _find(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        return shard, rows - self._starts[shard]


def _map_shard(folder: Path, shard: ShardCard, spec: Spec) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """`posterior` and `labels` of one file, as arrays that lie on the disk."""
    file = folder / shard.file
    if not file.is_file():
        raise DataError(f"{file} is missing. Give the encode command again")
    if file.stat().st_size != shard.bytes:
        raise DataError(f"{file} is truncated: {file.stat().st_size} bytes, and {SPEC} says {shard.bytes}. {REPAIR}")
    stored, read = DTYPES[spec.dtype]
    wanted = {"posterior": (stored, [shard.rows, *spec.row_shape]), "labels": ("I64", [shard.rows])}
    raw = np.memmap(file, mode="r", dtype=np.uint8)
    try:
        begin = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:begin].tobytes())
        if any((header[name]["dtype"], header[name]["shape"]) != wanted[name] for name in wanted):
            raise ValueError(f"it does not hold {wanted}")
        spans = {name: slice(*(begin + offset for offset in header[name]["data_offsets"])) for name in wanted}
        posterior: NDArray[Any] = raw[spans["posterior"]].view(read).reshape(shard.rows, *spec.row_shape)
        labels = raw[spans["labels"]].view(np.int64)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged: {error}. {REPAIR}") from error
    return posterior, labels


# ---- statistics


@dataclass(frozen=True)
class Moments:
    """Sums over rows and places, by channel: enough for mean and std of draws from the posterior."""

    count: int
    total: Sequence[float]  # of the mean
    square: Sequence[float]  # of mean^2 + std^2

    @classmethod
    def of(cls, posterior: Tensor) -> "Moments":
        """Of posteriors (n, flips, 2, C, h, w), in float64, some rows at a time."""
        if len(posterior) > ROWS_AT_ONCE:
            return cls.joined(map(cls.of, posterior.split(ROWS_AT_ONCE)))
        mean, std = posterior.double().unbind(2)  # (n, flips, C, h, w)
        keep = (0, 1, 3, 4)
        total, square = mean.sum(keep), (mean.square() + std.square()).sum(keep)
        return cls(mean[:, :, 0].numel(), tuple(total.tolist()), tuple(square.tolist()))

    @classmethod
    def joined(cls, parts: Iterable["Moments"]) -> "Moments":
        """Of all parts together; fsum does not depend on their order."""
        parts = list(parts)
        total, square = (
            tuple(math.fsum(column) for column in zip(*(getattr(part, name) for part in parts), strict=True))
            for name in ("total", "square")
        )
        return cls(sum(part.count for part in parts), total, square)

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple(total / self.count for total in self.total)

    @property
    def std(self) -> tuple[float, ...]:
        pairs = zip(self.square, self.mean, strict=True)
        return tuple(math.sqrt(max(square / self.count - mean**2, 0.0)) for square, mean in pairs)
