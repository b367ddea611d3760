"""Processes: which device and precision, what is split over them, what they agree on, and when they stop."""

import ctypes
import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object, is_tensorboard_available
from torch import Tensor, nn

from dispersive_kit.errors import CheckpointError, ConfigError

# Of one process for another, which may read a store of 42 GB against its hashes before the first step.
LONGEST_WAIT = timedelta(hours=4)


def make_accelerator(precision: str = "auto", tensorboard: Path | None = None) -> Accelerator:
    """The number of processes comes from the launcher. precision "auto": bf16 autocast on a GPU that has it, else fp32.

    tensorboard: folder to which its tracker writes.

    Raises:
        ConfigError: TensorBoard is not installed; `accelerate launch` was asked for several processes and started one;
            this process has trained in another precision before.
    """
    has_it = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = precision == "bf16" or (precision == "auto" and has_it)
    if tensorboard and not is_tensorboard_available():
        raise ConfigError("tensorboard is not installed: pip install 'dispersive-kit[tensorboard]'")
    patient = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    # cpu=True: without it a launcher of several CPU processes would give as many runs of one process each.
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision="bf16" if bf16 else "no",
            kwargs_handlers=[patient],
            log_with="tensorboard" if tensorboard else None,
            project_dir=tensorboard,
        )
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        raise ConfigError("this process has trained in another precision before: restart the kernel") from error
    # Without --multi_gpu its launcher gives one process an address to meet the others at, and starts no others.
    alone = accelerator.num_processes == 1 and "RANK" not in os.environ
    if alone and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
        raise ConfigError(
            "accelerate launch was asked for several processes and has started one. It starts several with "
            "--multi_gpu, also where there is no GPU, and not with --cpu; so does torchrun"
        )
    keep_freed_memory(accelerator.device)
    return accelerator


def keep_freed_memory(device: torch.device) -> None:
    """On a Linux CPU: what a step frees stays with the process for the next step, until the process ends.

    glibc would give large blocks back to the kernel and take them again as zeroed pages: up to 200,000 page faults
    in a training step of DiT-S/4 at batch 32, and a fifth of a guided DiT-T/2's time at batch 16.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and device.type == "cpu":
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def place(accelerator: Accelerator, model: Any, average: Any, *, compiled: bool, fsdp: bool) -> nn.Module:
    """The model as it is called in training: its blocks compiled, its parameters or its batch split over processes."""
    if compiled:
        for block in model.blocks:
            block.compile()
    if not fsdp:
        return accelerator.prepare_model(model)
    for one in (model, average):
        _shard(one, accelerator.device)
    return model


def _shard(model: Any, device: torch.device) -> None:
    """FSDP2: each process holds its part of every parameter, and a block is gathered while it computes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in (*model.blocks, model):
        # True also for the whole model: an average is only ever called forward, and must be split again after it.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def whole(tensor: Any) -> Tensor:
    """A sharded tensor gathered from all processes, which must all call this; any other tensor as it is.

    (To look for the class of sharded tensors would load its module, which is slow and needless in one process.)
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state_of(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The optimizer's tensors, whole and by names like "3.exp_avg", and its groups; all processes must call this."""
    state = optimizer.state_dict()
    entries = state["state"].items()
    return {f"{i}.{name}": whole(value) for i, entry in entries for name, value in entry.items()}, state["param_groups"]


def restore_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], param_groups: list[dict[str, Any]]
) -> None:
    """The inverse of `state_of`: what has the shape of a sharded parameter is split as that is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        like = parameters[int(index)]
        if hasattr(like, "device_mesh") and value.shape == like.shape:
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, like.device_mesh, like.placements)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": param_groups})


def require_agreement(what: str, value: Any) -> None:
    """All processes must call this with the same value.

    Raises:
        CheckpointError: they do not, in every one of them.
    """
    found = gather_object([value])
    if any(one != found[0] for one in found):
        raise CheckpointError(f"the processes do not agree on the {what}: {', '.join(map(str, found))}, by rank")


class StopRequest:
    """Ctrl-C and SIGTERM end a run after the step in hand, with a checkpoint, instead of in the middle of one.

    While entered, the signals only set `signal_number`; a second SIGINT acts at once.
    Handlers can be set in the main thread only; elsewhere this does nothing, and signals act as usual.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}
        self._over = False

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        for number in self._previous:
            if signal.getsignal(number) == self._note:  # else a run that was begun later has it, and gives it back
                signal.signal(number, self._before(number))

    def _before(self, number: int) -> Any:
        """The handler there was before this run and before all that have ended since."""
        handler = self._previous[number]
        owner = getattr(handler, "__self__", None)
        return owner._before(number) if isinstance(owner, StopRequest) and owner._over else handler

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether a process got one of the signals; all must call this."""
        mine = self.signal_number is not None
        if accelerator.num_processes == 1:
            return mine
        return bool(accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), "sum"))

    def end_run(self) -> None:
        """Ends the run as the signal would have: KeyboardInterrupt, or exit status 128 + 15.

        A process that was not signalled itself, but whose neighbour was, ends as by SIGTERM.
        """
        if self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.signal_number or signal.SIGTERM))
