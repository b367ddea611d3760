"""Encodings in processes of their own, started from a clean one: a process with threads cannot be forked safely."""

import multiprocessing

import numpy as np
import small_autoencoders
from PIL import Image

from dispersive_kit.data.encode import encode
from dispersive_kit.data.encoder import EncodeConfig, Encoder

SMALL = {"image_size": 16, "shard_size": 7, "batch_size": 3, "readers": 2}
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["encode_jobs", "torchvision.transforms.v2", "torchvision.datasets.folder"])


def write_photos(root, classes, count, *, size=(24, 20), seed=0):
    """`count` photographs of noise spread over `classes` folders."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        folder = root / classes[i % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return root


def make(photos, store, autoencoder="patches", *, drawn=None, **options):
    """Encode `photos` with the small settings of these tests, but for `options`."""
    if drawn:
        small_autoencoders.register_drawn(*drawn)
    return encode(Encoder(EncodeConfig(photos, autoencoder, store, **{**SMALL, **options})))


def run(*args, **options):
    """`make` for a process, which must not send the store back."""
    make(*args, **options)


def start(number, *args, **options):
    """The same encoding in so many processes at once, of which none knows of the others."""
    started = [CLEAN.Process(target=run, args=args, kwargs=options) for _ in range(number)]
    for process in started:
        process.start()
    return started


def in_processes(number, *args, **options):
    started = start(number, *args, **options)
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * number
