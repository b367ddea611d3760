"""`two_processes.py FOLDER`: one of two gloo processes, that sample and train on their halves."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dispersive_kit.diffusion.guidance import ClassifierFree
from dispersive_kit.diffusion.objectives import DDPM, FlowMatching, MeanFlow
from dispersive_kit.diffusion.samplers import euler_maruyama, initial_noise, time_grid
from dispersive_kit.models.dit import build_dit

OBJECTIVES = {"flow": FlowMatching(), "ddpm": DDPM(), "meanflow": MeanFlow(equal_share=0.25)}


def network():
    model = build_dit("DiT-T/4", input_size=8, num_classes=5, depth=2, interval=True, time_scale=10.0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p * 0 + 0.05 * torch.randn(p.shape, generator=generator))
    return model


def sample(model, seeds):
    guidance = ClassifierFree(torch.tensor([s % 5 for s in seeds]), 5, scale=1.5, low=0.3)
    noise = initial_noise(seeds, (4, 8, 8), dtype=torch.float64)
    return euler_maruyama(model, noise, time_grid(5), guidance=guidance, seeds=seeds)


def gradients(model, objective, rank, world):
    """Gradients after one step on this process's rows of a batch of 8, with a loss on a tap as well."""
    generator = torch.Generator().manual_seed(9)
    x0 = torch.randn(8, 4, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    draws = objective.draw(x0, generator)[rows]
    model.zero_grad()
    loss, aux = objective(model, x0[rows], y[rows], draws=draws, taps=(0,))
    (loss + 0.1 * aux.taps[0].square().mean()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    result = {}
    for name, objective in OBJECTIVES.items():
        model = DistributedDataParallel(network())
        gradients(model, objective, rank, 2)  # in its second step DDP lays out its buckets anew
        result[name] = gradients(model, objective, rank, 2)
    result["images"] = sample(model, list(range(rank * 4, rank * 4 + 4)))
    torch.save(result, Path(folder) / f"result{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
