"""Processes: their device and precision, what they must agree on, and when they stop."""

import ctypes
import os
import signal
import sys
import threading
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs

from dispersive_kit.errors import ConfigError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_entered: list["StopRequest"] = []
_before: dict[int, Any] = {}  # the handlers before the first run


def this_process() -> PartialState:
    """Rank, number of processes and device; one process if there is no launcher."""
    return PartialState(cpu=not torch.accelerator.is_available())


def make_accelerator(precision: str = "auto") -> Accelerator:
    """The number of processes comes from the launcher. precision "auto": bf16 autocast on a GPU that has it, else fp32.

    Raises ConfigError: `accelerate launch` was told to start several processes and started one; this process has
        already trained in another precision.
    """
    has_it = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = precision == "bf16" or (precision == "auto" and has_it)
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=4))  # one checks the hashes of a store, 42 GB perhaps
    cpu = not torch.accelerator.is_available()  # otherwise each of several CPU processes would train alone
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if bf16 else "no", kwargs_handlers=[patient])
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        raise ConfigError("this process has trained in another precision before: restart the kernel") from error
    # Without --multi_gpu, accelerate's launcher sets the address of a process group but starts only one process.
    alone = accelerator.num_processes == 1 and "RANK" not in os.environ
    if alone and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
        raise ConfigError(
            "accelerate launch started one process and not several. Add --multi_gpu, even without a GPU, and leave "
            "out --cpu; or use torchrun"
        )
    keep_freed_memory(accelerator.device)
    return accelerator


def keep_freed_memory(device: torch.device) -> None:
    """On a Linux CPU: the process keeps the memory that a step frees, and uses it again in the next step.

    Otherwise glibc returns large blocks to the kernel and gets them again as zeroed pages: up to 200,000 page faults
    in a training step of DiT-S/4 at batch 32, and a fifth of a guided DiT-T/2's time at batch 16.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and device.type == "cpu":
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD of malloc.h
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


class StopRequest:
    """Ctrl-C and SIGTERM end a run after the current step, with a checkpoint; a second Ctrl-C ends it at once.

    If one process has several runs, the one that began last gets the signal. Only the main thread can set handlers.
    """

    signal_number: int | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if (before := signal.signal(number, _note)) is not _note:
                    _before[number] = before
            _entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self in _entered:
            _entered.remove(self)
        for number in SIGNALS:
            if not _entered and signal.getsignal(number) is _note:  # otherwise the kernel has set its own handler since
                signal.signal(number, _before[number])

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any process got one of the signals. All processes must call this."""
        mine = self.signal_number is not None
        if accelerator.num_processes == 1:
            return mine
        return bool(accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), "sum"))

    def end_run(self) -> None:
        """End as the signal would have done. If only another process got a signal, end as after SIGTERM."""
        if self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.signal_number or signal.SIGTERM))


def _note(number: int, frame: FrameType | None) -> None:
    last = _entered[-1]
    if last.signal_number is not None and number == signal.SIGINT:
        raise KeyboardInterrupt
    last.signal_number = number
