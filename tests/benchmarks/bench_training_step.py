"""One training step with Dispersive Loss: `python tests/benchmarks/bench_training_step.py [--quick]`.

DiT-S/4, batch 32, latents 4x32x32, against `public_style.py`: the network and the step as the public repositories
write them. Each lives in a process of its own, because the kit tells the allocator to keep what a step frees
(`keep_freed_memory`) and the public code does not; the processes take turns, step by step, and the other one sleeps.

"Outside" is the part of those same steps that is neither the model's forward nor its backward pass: noise, path,
losses with their gradients, optimizer, average, `.item()`. Hooks on the model part the two.
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

BATCH, TAP, WEIGHT = 32, 2, 0.25


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


def serve(pipe: Connection, ours: bool) -> None:
    """Take a step whenever the pipe asks for one, and send how long its parts took."""
    torch.manual_seed(0)
    model = build_dit("DiT-S/4")
    if ours:
        keep_freed_memory(torch.device("cpu"))
    else:
        weights, model = model.state_dict(), PublicSiT()
        model.load_state_dict(weights)
    side, clock = Ours(model) if ours else PublicStyle(model, TAP, WEIGHT), Clock(model)
    data = torch.randn(BATCH, 4, 32, 32), torch.randint(0, 1000, (BATCH,))
    while pipe.recv():
        pipe.send(clock.measure(side.step, *data))


def measure(repeats: int) -> dict[tuple[str, str], float]:
    """Median seconds of each part of each arm's step; the arms take turns, so that other load meets all alike."""
    context, pipes, processes = get_context("spawn"), {}, []
    for name in ("ours", "public"):
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, name == "ours")))
        processes[-1].start()
    seen: dict[tuple[str, str], list[float]] = {}
    for i in range(repeats + 2):
        for name, pipe in pipes.items():
            pipe.send(True)
            for part, seconds in pipe.recv().items():
                if i >= 2:  # two rounds of warming up
                    seen.setdefault((name, part), []).append(seconds)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    return {key: statistics.median(seconds) for key, seconds in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    took = measure(repeats=3 if parser.parse_args().quick else 11)
    print(f"DiT-S/4, batch {BATCH}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for what, part, wanted in (
        ("step / step in the public style", "step", "at most 0.92"),
        ("  the model's forward and backward", "model", ""),
        ("  outside forward and backward", "outside", "at most 0.333 on several threads"),
    ):
        a, b = took["ours", part], took["public", part]
        print(f"{what:36s} {f'{1e3 * a:.1f} ms / {1e3 * b:.1f} ms = {a / b:.3f}':36s} {wanted}")


if __name__ == "__main__":
    main()
