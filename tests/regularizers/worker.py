"""Run as `worker.py FOLDER`: gradients with Dispersive Loss in a process group, saved by rank 0."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from nets import T, X, small_dit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dispersive_kit.errors import DispersiveError
from dispersive_kit.regularizers import Dispersive
from dispersive_kit.regularizers.attach import all_gather

OPTIONS = {"at": "blocks.1", "weight": 0.5, "tau": 0.5, "ignore_same_class": True}
Y = torch.arange(6) % 4


def make_model() -> nn.Module:
    return small_dit(num_classes=4, class_dropout_prob=0.0)


def backward(model: nn.Module, reg: Dispersive, rows: slice) -> dict[str, torch.Tensor]:
    """Mean-reduced denoising stand-in plus Dispersive Loss; full gradients by name."""
    x, t, y = (part[rows] for part in (X, T, Y))
    with reg:
        out = model(x, t, y)
    (out.square().mean() + reg.loss(y=y)).backward()
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def refused(call) -> str:
    try:
        call()
    except DispersiveError as error:
        return str(error)
    return "nothing raised"


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, share = dist.get_rank(), len(X) // dist.get_world_size()
    rows = slice(rank * share, (rank + 1) * share)
    results = {}
    for gather in (False, True):
        model = make_model()
        reg = Dispersive(model, **OPTIONS, gather=gather)
        results[f"ddp gather={gather}"] = backward(DistributedDataParallel(model), reg, rows)
        results[f"batch gather={gather}"] = reg.stats.batch_size
    model = DistributedDataParallel(make_model())
    results["ddp attached to the wrapper"] = backward(model, Dispersive(model, **OPTIONS, gather=True), rows)
    model = make_model()
    reg = Dispersive(model, **OPTIONS, gather=True)
    results["fsdp hook before"] = backward(shard(model), reg, rows)
    model = shard(make_model())
    results["fsdp hook after"] = backward(model, Dispersive(model, **OPTIONS, gather=True), rows)
    reg = Dispersive(make_model(), "blocks.1", gather=True)
    results["uneven"] = refused(lambda: backward(reg.model, reg, slice(0, 2 + rank)))
    unlike = {
        "shapes": torch.zeros(2, 3, 4 + rank),
        "axes": torch.zeros(2, 3, 4) if rank else torch.zeros(2, 12),
        "dtypes": torch.zeros(2, 3, dtype=[torch.float, torch.bfloat16][rank]),
    }
    results |= {name: refused(lambda z=z: all_gather(z)) for name, z in unlike.items()}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
