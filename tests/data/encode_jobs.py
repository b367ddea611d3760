"""Encodings in processes of their own, started from a clean one: a process with threads cannot be forked safely."""

import multiprocessing
import time

import numpy as np
import small_autoencoders
from PIL import Image

from dispersive_kit.data.encode import Encoder, encode
from dispersive_kit.data.files import lock

SMALL = {"image_size": 16, "shard_size": 7, "batch_size": 3}
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


def make(photos, store, autoencoder="patches", *, drawn=None, parts=1, **options):
    """Encode `photos` with the small settings of these tests, but for `options`, in so many parts, the first last."""
    if drawn:
        small_autoencoders.register_drawn(*drawn)
    return [run((number, parts), photos, store, autoencoder, **options) for number in reversed(range(parts))][-1]


def run(part, photos, store, autoencoder, **options):
    """One part of `make`, also for a process."""
    return encode(Encoder(photos, autoencoder, store, **{**SMALL, **options}), part=part)


def hold(file, held):
    """Keep a lock until killed."""
    with lock(file):
        held.set()
        time.sleep(600)


def start(number, *args, **options):
    """The parts of one encoding in so many processes, of which none knows of the others."""
    started = [CLEAN.Process(target=run, args=((i, number), *args), kwargs=options) for i in range(number)]
    for process in started:
        process.start()
    return started
