"""50 Heun steps with classifier-free guidance: `python tests/benchmarks/bench_sampling.py [--quick]`.

DiT-T/2 on 4x16x16. Guidance on the interval 0.3..0.8 of t and guidance everywhere, both as one batch of 2B
where guided, against two separate forward passes; timed in the same run, in turns. The allocator keeps what is freed,
as wherever the kit samples: without it page faults make the batch of 2B a fifth slower than two of B.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dispersive_kit.diffusion.guidance import ClassifierFree
from dispersive_kit.diffusion.samplers import heun, initial_noise, time_grid
from dispersive_kit.models.dit import build_dit
from dispersive_kit.training.parallel import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 steps, two repeats")
    quick = parser.parse_args().quick
    steps, repeats, B = (10, 2, 4) if quick else (50, 7, 16)
    torch.manual_seed(0)
    keep_freed_memory(torch.device("cpu"))
    network = build_dit("DiT-T/2", input_size=16, num_classes=10).eval()
    y, null, seeds = torch.arange(B) % 10, torch.full((B,), 10), list(range(B))

    def separate(model: Callable, x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t)
        conditional, unconditional = model(x, times, y), model(x, times, null)
        return unconditional + 1.5 * (conditional - unconditional)

    arms = {
        "guided in 0.3..0.8": ClassifierFree(y, 10, scale=1.5, low=0.3, high=0.8),
        "guided everywhere": ClassifierFree(y, 10, scale=1.5),
        "two separate passes": separate,
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats + 1):
        for name, guidance in arms.items():
            start = time.perf_counter()
            heun(network, initial_noise(seeds, (4, 16, 16)), time_grid(steps), guidance=guidance)
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["two separate passes"][1:])
    print(f"Heun, {steps} steps, batch {B}, DiT-T/2 on 4x16x16, {torch.get_num_threads()} threads")
    for name, times in seconds.items():
        took = statistics.median(times[1:])
        print(f"{name:22s} {took:7.3f} s = {took / base:.3f}")


if __name__ == "__main__":
    main()
