"""One training step with Dispersive Loss: `python tests/benchmarks/bench_training_step.py [--quick]`.

DiT-S/4, batch 32, latents 4x32x32, against `public_style.py`: the network and the step as the public repositories
write them. Each lives in a process of its own, because the kit tells the allocator to keep what a step frees
(`keep_freed_memory`) and the public code does not; the processes take turns, step by step, and the other one sleeps.
"""

from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
from bench_gpu import Kit
from public_style import PublicSiT, PublicStyle
from timing import in_turns, is_quick, row

from dispersive_kit.models.dit import build_dit
from dispersive_kit.training.parallel import keep_freed_memory

BATCH = 32


def serve(pipe: Connection, ours: bool) -> None:
    """Take a step whenever the pipe asks for one."""
    torch.manual_seed(0)
    cpu, model = torch.device("cpu"), build_dit("DiT-S/4")
    if ours:
        keep_freed_memory(cpu)
        step = Kit(model, False, cpu).step
    else:
        (public := PublicSiT()).load_state_dict(model.state_dict())
        step = PublicStyle(public, tap=2, weight=0.5).step
    data = torch.randn(BATCH, 4, 32, 32), torch.randint(0, 1000, (BATCH,))
    while pipe.recv():
        step(*data)
        pipe.send(True)


def main() -> None:
    rounds, context, pipes = 3 if is_quick(__doc__) else 11, get_context("spawn"), {}
    for name in ("kit", "public"):
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, name == "kit"), daemon=True).start()
    a, b = in_turns({name: lambda p=pipe: (p.send(True), p.recv()) for name, pipe in pipes.items()}, rounds).values()
    for pipe in pipes.values():
        pipe.send(False)
    print(f"DiT-S/4, batch {BATCH}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    row("step / step in the public style", f"{1e3 * a:.1f} ms / {1e3 * b:.1f} ms = {a / b:.3f}")


if __name__ == "__main__":
    main()
