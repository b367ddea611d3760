"""One batch of all processes, with gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import DispersiveError


class AllGather(torch.autograd.Function):
    """Rows of all processes in the order of rank; the backward sums each process's gradient for my rows."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.rows = len(z)
        out = z.new_empty(dist.get_world_size() * len(z), *z.shape[1:])
        dist.all_gather_into_tensor(out, z.contiguous())
        return out  # (W B, ...)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Every process computes the same loss, and DDP averages: the sum here makes the mean the gradient of
        # one process with the whole batch. Keeping only the own slot's gradient would give 1 / W of it.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows]


def all_gather(z: Tensor) -> Tensor:
    """z (B, ...) of every process as (W B, ...), differentiable; itself where there is one process.

    Raises DispersiveError: torch.distributed is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise DispersiveError(
            "gather=True outside a process group: call torch.distributed.init_process_group first "
            "(accelerate and "
            "torchrun scripts do), or leave gather=False"
        )
    return AllGather.apply(z) if dist.get_world_size() > 1 else z
