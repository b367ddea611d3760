"""Placement: which device, which precision, and which rows of the global batch belong to this process."""

import torch
from accelerate import Accelerator

from dispersive_kit.errors import ConfigError


def make_accelerator() -> Accelerator:
    """bf16 autocast on a GPU that has it, float32 elsewhere; the number of processes comes from the launcher."""
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    # cpu=True: without it a launcher of several CPU processes would give as many runs of one process each.
    return Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="bf16" if bf16 else "no")


def check_split(batch_size: int, processes: int, accumulation: int) -> int:
    """The dispersion batch: what one process feeds the model at once, and what Dispersive Loss sees.

    Raises:
        ConfigError: the global batch cannot be split evenly.
    """
    parts = processes * accumulation
    if batch_size % parts:
        raise ConfigError(
            f"batch_size {batch_size} cannot be split over {processes} processes x {accumulation} accumulation; "
            f"use a multiple of {parts}"
        )
    return batch_size // parts
