"""How far a training has come, shown while it goes."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
from tqdm import tqdm

from dispersive_kit.training.train import StepRecord

SHOWN = ("loss", "held_out")


def progress(records: Iterable[StepRecord], label: str = "") -> Iterator[StepRecord]:
    """Pass step records through and show how far they have come: a bar on a terminal, one line a tenth elsewhere.

    Of several processes the first one does. (A bar that is saved, as in a notebook, freezes at 0 %.)
    """
    if os.environ.get("RANK", "0") != "0":
        yield from records
        return
    bar, shown, tenths, first, start = None, "", -1, 0, time.monotonic()
    for record in records:
        if record.values:
            shown = "  ".join(f"{k} {record.values[k]:.3f}" for k in SHOWN if k in record.values)
        first = first or record.step
        if sys.stderr.isatty():
            bar = bar or tqdm(total=record.steps, initial=first - 1, desc=label, unit="step", dynamic_ncols=True)
            bar.set_postfix_str(f"{shown}  {_memory_gib():.1f} GiB", refresh=False)
            bar.update()
        elif record.step * 10 // record.steps > tenths:
            tenths = record.step * 10 // record.steps
            rate = (record.step - first + 1) / max(time.monotonic() - start, 1e-9)
            left = timedelta(seconds=round((record.steps - record.step) / rate))
            line = f"{label} step {record.step}/{record.steps}  {shown}  {rate:.1f} step/s  {left} left"
            print(f"{line}  {_memory_gib():.1f} GiB".strip(), flush=True)
        yield record
    if bar:
        bar.close()


def _memory_gib() -> float:
    """Peak memory in GiB: the GPU's where there is one, else that of this process (0 where it cannot be known)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
