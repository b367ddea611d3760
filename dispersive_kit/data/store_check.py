"""A store looked at as a whole: checksums, counts, statistics, and a grid of its images, decoded."""

import math
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from dispersive_kit.data.autoencoders import Autoencoder
from dispersive_kit.data.images import to_uint8
from dispersive_kit.data.latents import LatentStore, Moments
from dispersive_kit.data.permutation import key_of, permute
from dispersive_kit.errors import DataError

GRID = 16


def check_store(store: LatentStore) -> Iterator[str]:
    """Yield a line for each thing found right; `decoded_grid` is the part for the eye.

    Raises:
        DataError: at the first thing that is wrong, named.
    """
    spec = store.spec
    store.verify()
    yield f"checksums of {len(spec.shards)} shards"
    _check_counts(store)
    yield f"counts: {len(store):,} rows of {len(spec.classes)} classes, {len(spec.images['left_out'])} files left out"
    _check_statistics(store)
    moments = spec.channel_mean, spec.channel_std
    yield "statistics: " + ", ".join(f"{m:+.3f} +- {s:.3f}" for m, s in zip(*moments, strict=True))


def _check_counts(store: LatentStore) -> None:
    spec = store.spec
    found = np.bincount(store.all_labels(), minlength=len(spec.classes)).tolist()
    if len(found) > len(spec.classes):
        raise DataError(f"{store.path}: a label is {len(found) - 1}, and there are {len(spec.classes)} classes")
    for name, rows, written in zip(spec.classes, found, spec.class_counts, strict=True):
        if rows != written:
            raise DataError(f"{store.path}: {rows} rows are of class {name}, and spec.json says {written}")
    if spec.images["files"] != len(store) + len(spec.images["left_out"]):
        raise DataError(f"{store.path}: {spec.images['files']} files are not {len(store)} rows and those left out")


def _check_statistics(store: LatentStore) -> None:
    moments = Moments.joined(Moments.of(block) for block in store.blocks())
    for name, found, written in (
        ("mean", moments.mean, store.spec.channel_mean),
        ("std", moments.std, store.spec.channel_std),
    ):
        if not all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6) for a, b in zip(found, written, strict=True)):
            raise DataError(f"{store.path}: the {name} by channel is {found}, and spec.json says {written}")


def decoded_grid(store: LatentStore, autoencoder: Autoencoder, number: int = GRID) -> Tensor:
    """Posterior means of rows spread over the store, decoded: uint8 (number or fewer, 3, H, W)."""
    number = min(number, len(store))
    rows = permute(np.arange(number), len(store), key_of("grid"))
    means = store.read(rows)[:, 0].float()  # (n, C, h, w)
    return to_uint8(autoencoder.images(autoencoder.card.to_model(means)))
