"""50 Heun steps with classifier-free guidance: `python tests/benchmarks/bench_sampling.py [--quick]`.

DiT-T/2 on 4x16x16. Guidance on the interval 0.3..0.8 of t and guidance everywhere, both as one batch of 2B
where guided, against two separate forward passes; timed in turns. The allocator keeps what is freed,
as wherever the kit samples: without it page faults make the batch of 2B a fifth slower than two of B.
"""

from collections.abc import Callable

import torch
from timing import in_turns, is_quick, row
from torch import Tensor

from dispersive_kit.diffusion.guidance import ClassifierFree
from dispersive_kit.diffusion.samplers import heun, initial_noise, time_grid
from dispersive_kit.models.dit import build_dit
from dispersive_kit.training.parallel import keep_freed_memory


def main() -> None:
    steps, rounds, B = (10, 2, 4) if is_quick(__doc__) else (50, 7, 16)
    torch.manual_seed(0)
    keep_freed_memory(torch.device("cpu"))
    network = build_dit("DiT-T/2", input_size=16, num_classes=10).eval()
    y, null, x = torch.arange(B) % 10, torch.full((B,), 10), initial_noise(range(B), (4, 16, 16))

    def separate(model: Callable, x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t)
        conditional, unconditional = model(x, times, y), model(x, times, null)
        return unconditional + 1.5 * (conditional - unconditional)

    guided = {
        "guided in 0.3..0.8": ClassifierFree(y, 10, scale=1.5, low=0.3, high=0.8),
        "guided everywhere": ClassifierFree(y, 10, scale=1.5),
        "two separate passes": separate,
    }
    grid = time_grid(steps)
    took = in_turns({name: lambda g=g: heun(network, x, grid, guidance=g) for name, g in guided.items()}, rounds)
    print(f"Heun, {steps} steps, batch {B}, DiT-T/2 on 4x16x16, {torch.get_num_threads()} threads")
    for name, seconds in took.items():
        row(name, f"{seconds:.3f} s = {seconds / took['two separate passes']:.3f}")


if __name__ == "__main__":
    main()
