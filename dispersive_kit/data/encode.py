"""Encode a folder of images once: a shard is a function of the plan, and any number of processes make them together.

No process knows of the others. Each takes the next shard that is neither finished nor locked, writes it under another
name, flushes it to disk and renames it, and then does the same with a record of it. A lock (flock) ends with its
process, so what a killed one had begun is taken over by those that are left, or by the next command. Whoever sees the
last record writes spec.json. The bytes do not depend on how many there were, nor on kills: a batch never crosses a
shard, and on a CPU each process has one thread.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from tqdm import tqdm

from dispersive_kit.data.encoder import EncodeConfig, Encoder
from dispersive_kit.data.latents import LatentStore
from dispersive_kit.errors import KitError


def encode(encoder: Encoder, *, processes: int = 1, on_batch: Callable[[Encoder], None] | None = None) -> LatentStore:
    """Encode a folder of images, or go on with it.

    Args:
        processes: this one and as many more as are needed, on the GPUs in turn; a launcher such as torchrun may
            start more. on_batch: called after each batch of this process.

    Raises:
        ConfigError: the store was begun with other settings. DataError: a damaged image with `strict`; no readable
            image at all; latents that are not finite; a full disk.
    """
    encoder.begin()
    encoder.on_batch = on_batch or encoder.on_batch
    with helpers(encoder.config, processes - 1):
        encoder.work()
    encoder.finish()
    return LatentStore(encoder.config.store)


@contextlib.contextmanager
def helpers(config: EncodeConfig, number: int) -> Iterator[None]:
    """More processes at the same store; one that fails leaves its part to the others, and is reported."""
    context = multiprocessing.get_context("spawn")
    devices = [device_in_turn(config.device, i + 1, torch.cuda.device_count()) for i in range(number)]
    started = [context.Process(target=_help, args=(replace(config, device=d),), daemon=True) for d in devices]
    for process in started:
        process.start()
    try:
        yield
        for process in started:
            process.join()
    finally:
        for process in started:
            process.terminate()
    if failed := sum(process.exitcode != 0 for process in started):
        warnings.warn(f"{failed} of {number} helping processes failed; the others did their part", stacklevel=2)


def device_in_turn(first: str, turn: int, gpus: int) -> str:
    """The device of the `turn`-th process after the first; where there are more processes than GPUs, they share."""
    kind, _, index = first.partition(":")
    return f"{kind}:{(int(index or 0) + turn) % gpus}" if kind == "cuda" else first


def _help(config: EncodeConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends its helpers
    first = os.getppid()

    def end_with_the_first(encoder: Encoder) -> None:
        if os.getppid() != first:  # it was killed
            raise SystemExit(1)

    try:
        encode(Encoder(config), on_batch=end_with_the_first)
    except KitError as error:
        print(f"error in a helping process: {error}", file=sys.stderr)
        raise SystemExit(2) from error


class EncodeProgress:
    """Images done by all processes, rate and time left: a bar on a terminal, one line per tenth elsewhere."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.began, self.done_before, self.tenths = time.monotonic(), -1, -1

    def __call__(self, encoder: Encoder) -> None:
        done, total = encoder.done, len(encoder.folder.files)
        if self.done_before < 0:  # what an earlier command did says nothing of the rate
            self.done_before = done - encoder.in_hand
            self.bar = tqdm(total=total, initial=self.done_before, unit="image") if sys.stderr.isatty() else None
        if self.bar:
            self.bar.update(done - self.bar.n)
        elif done * 10 // total > self.tenths and done > self.done_before:
            self.tenths = done * 10 // total
            rate = (done - self.done_before) / (time.monotonic() - self.began)
            left = tqdm.format_interval((total - done) / rate)
            print(f"{done:,} of {total:,} images, {rate:.1f} a second, {left} left", flush=True)
