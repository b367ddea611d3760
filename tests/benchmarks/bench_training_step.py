"""One training step with Dispersive Loss: `python tests/benchmarks/bench_training_step.py [--quick]
[--compile]`.

DiT-S/4, batch 32, latents 4x32x32, against `public_style.py`: the network and the step as the public repositories
write them. Each lives in a process of its own, because the kit tells the allocator to keep what a step frees
(`keep_freed_memory`) and the public code does not; the processes take turns, step by step, and the other one sleeps.

"Outside" is the part of those same steps that is neither the model's forward nor its backward pass: noise, path,
losses with their gradients, optimizer, average, `.item()`. Hooks on the model part the two. The rate of matrix
products is that of the model's own shapes, forward and backward, in the same run. What bounds "outside" on several
cores is memory: AdamW reads or writes seven numbers a parameter and the average three, and the time in which that
many pass through one plain `lerp_` over as many parameters is printed beside it.

With --compile each block is compiled in both; the last line then has the public style as it is published, eager.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from public_style import PublicSiT, PublicStyle
from torch import Tensor, nn

from dispersive_kit.diffusion.objectives import FlowMatching
from dispersive_kit.models.dit import build_dit
from dispersive_kit.regularizers.attach import Dispersive
from dispersive_kit.training.parallel import keep_freed_memory
from dispersive_kit.training.train import EMA

BATCH, TOKENS, DEPTH, WIDTH, HEADS, TAP, WEIGHT = 32, 64, 12, 384, 6, 2, 0.25


class Ours:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.generator = model, torch.Generator().manual_seed(0)
        self.reg = Dispersive.from_preset(model, "official-pytorch", at=f"blocks.{TAP}", weight=WEIGHT)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        self.ema = EMA(model)

    def step(self, x0: Tensor, y: Tensor, lap: Callable[[str], None]) -> None:
        with self.reg:
            loss, aux = FlowMatching()(self.model, x0, y, generator=self.generator)
        loss = loss + self.reg.loss(t=aux.t)
        lap("outside")
        loss.backward()
        lap("model")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model)


class Clock:
    """Seconds of one step, spent in the model's forward and backward pass ("model") and "outside"."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds, self.last = {"model": 0.0, "outside": 0.0}, time.perf_counter()
        model.register_forward_pre_hook(lambda *_: self.lap("outside"))
        model.register_forward_hook(self.leave)

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now

    def leave(self, module: nn.Module, inputs: Any, out: Tensor) -> None:
        self.lap("model")
        out.register_hook(lambda grad: self.lap("outside"))  # backward has passed the losses and enters the model

    def measure(self, step: Callable[..., None], *args: Tensor) -> dict[str, float]:
        self.seconds, self.last = {"model": 0.0, "outside": 0.0}, time.perf_counter()
        step(*args, self.lap)
        self.lap("outside")
        return {**self.seconds, "step": sum(self.seconds.values())}


def serve(pipe: Connection, ours: bool, compiled: bool) -> None:
    """Do what the pipe asks for, a step or what bounds it, and send how long its parts took."""
    torch.manual_seed(0)
    model = build_dit("DiT-S/4")
    if ours:
        keep_freed_memory(torch.device("cpu"))
    else:
        weights, model = model.state_dict(), PublicSiT()
        model.load_state_dict(weights)
    for block in model.blocks if compiled else ():
        block.compile()
    side, clock = Ours(model) if ours else PublicStyle(model, TAP, WEIGHT), Clock(model)
    data = torch.randn(BATCH, 4, 32, 32), torch.randint(0, 1000, (BATCH,))
    bounds = {"products": matrix_products(), "traffic": traffic(sum(p.numel() for p in model.parameters()))}
    while what := pipe.recv():
        if what == "step":
            pipe.send(clock.measure(side.step, *data))
        else:
            start = time.perf_counter()
            bounds[what]()
            pipe.send({what: time.perf_counter() - start})


def traffic(parameters: int) -> Callable[[], object]:
    """Ten numbers a parameter through the memory: a `lerp_` takes three."""
    average, values = torch.zeros(parameters * 10 // 3), torch.ones(parameters * 10 // 3)
    return lambda: average.lerp_(values, 0.1)


def matrix_products() -> Callable[[], None]:
    """Every matrix product of one forward and backward pass, and nothing else."""
    rows = BATCH * TOKENS
    shapes = DEPTH * [
        (rows, WIDTH, 3 * WIDTH), (rows, WIDTH, WIDTH), (rows, WIDTH, 4 * WIDTH), (rows, 4 * WIDTH, WIDTH),
        (BATCH, WIDTH, 6 * WIDTH),
    ]  # fmt: skip
    operands = {s: (torch.randn(s[0], s[1]), torch.randn(s[2], s[1]), torch.randn(s[0], s[2])) for s in set(shapes)}
    heads = [torch.randn(BATCH * HEADS, TOKENS, WIDTH // HEADS) for _ in range(3)]
    scores = torch.randn(BATCH * HEADS, TOKENS, TOKENS)

    def run() -> None:
        for shape in shapes:
            x, w, g = operands[shape]
            torch.mm(x, w.T)
            torch.mm(g, w)
            torch.mm(g.T, x)
        for _ in range(DEPTH * 3):  # q k^T, and twice that backward; as many for the values
            torch.bmm(heads[0], heads[1].mT)
            torch.bmm(scores, heads[2])

    return run


def measure(arms: dict[str, tuple[bool, bool]], repeats: int) -> dict[tuple[str, str], float]:
    """Median seconds of each part of each arm's step; the arms take turns, so that other load meets all alike."""
    context, pipes, processes = get_context("spawn"), {}, []
    for name, (ours, compiled) in arms.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, ours, compiled)))
        processes[-1].start()
    seen: dict[tuple[str, str], list[float]] = {}
    for i in range(repeats + 2):
        for name, what in [*((name, "step") for name in arms), ("ours", "products"), ("ours", "traffic")]:
            pipes[name].send(what)
            for part, seconds in pipes[name].recv().items():
                if i >= 2:  # two rounds of warming up
                    seen.setdefault((name, part), []).append(seconds)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(None)
        process.join()
    return {key: statistics.median(seconds) for key, seconds in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--compile", action="store_true", help="compile each block in both")
    args = parser.parse_args()
    arms = {"ours": (True, args.compile), "public": (False, args.compile)}
    if args.compile:
        arms["public, eager"] = (False, False)
    took = measure(arms, repeats=3 if args.quick else 11)
    print(
        f"DiT-S/4, batch {BATCH}, torch {torch.__version__}, {torch.get_num_threads()} threads, compile={args.compile}"
    )

    def row(what: str, a: float, b: float, wanted: str) -> None:
        print(f"{what:36s} {f'{1e3 * a:.1f} ms / {1e3 * b:.1f} ms = {a / b:.3f}':36s} {wanted}")

    step = took["ours", "step"]
    row("step / step in the public style", step, took["public", "step"], "at most 0.92")
    row("  the model's forward and backward", took["ours", "model"], took["public", "model"], "")
    row("  outside forward and backward", took["ours", "outside"], took["public", "outside"], "at most 0.333")
    row("  memory traffic alone / our outside", took["ours", "traffic"], took["ours", "outside"], "")
    row("matrix products alone / our step", took["ours", "products"], step, "at least 0.60")
    if args.compile:
        row("step / public style as published", step, took["public, eager", "step"], "")


if __name__ == "__main__":
    main()
