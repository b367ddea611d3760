"""One batch of all processes, with gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dispersive_kit.errors import DispersiveError


class _AllGather(torch.autograd.Function):
    """Rows of all processes in the order of rank; the backward sums every process's gradient for the own rows."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.rows = len(z)
        out = z.new_empty(dist.get_world_size() * len(z), *z.shape[1:])
        dist.all_gather_into_tensor(out, z.contiguous())
        return out  # (W B, ...)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Every process computes the same loss, and DDP and FSDP average: with the sum, the mean is the gradient
        # of one process with the whole batch. The own slot's gradient alone would make 1 / W of it.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows]


def all_gather(z: Tensor) -> Tensor:
    """z (B, ...) of every process as (W B, ...), differentiable; itself where there is one process.

    Raises:
        DispersiveError: torch.distributed is not initialised; on a CPU, where looking costs nothing, batches of
            different size, shape or dtype.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise DispersiveError(
            "gather=True outside a process group: call torch.distributed.init_process_group first (accelerate and "
            "torchrun scripts do), or leave gather=False"
        )
    if dist.get_world_size() == 1:
        return z
    if z.device.type == "cpu":
        forms: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(forms, (tuple(z.shape), str(z.dtype)))
        if len(set(forms)) > 1:
            raise DispersiveError(
                f"gather=True over processes with features {forms}: all need one shape and dtype; where the last batch "
                "is smaller, set drop_last=True"
            )
    return _AllGather.apply(z)
