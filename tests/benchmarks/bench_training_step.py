"""One training step with Dispersive Loss: `python tests/benchmarks/bench_training_step.py [--quick]
[--compile]`.

DiT-S/4, batch 32, latents 4x32x32. The alternative is a plain re-statement in the style of the public
repositories: attention as softmax(q k^T) v, pdist loss, default AdamW, an EMA loop over the parameters,
`.item()` each step. A second row gives it the kit's network, so that only what surrounds the network differs.
All take turns in one run. The rate of matrix products is that of the model's own shapes, forward and
backward, in the same run.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dispersive_kit.diffusion.objectives import FlowMatching
from dispersive_kit.models.dit import DiT, build_dit
from dispersive_kit.regularizers.attach import Dispersive
from dispersive_kit.training.ema import EMA

BATCH, TOKENS, DEPTH, WIDTH, HEADS = 32, 64, 12, 384, 6


def interleaved(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each call; the calls take turns, so that other load meets all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for i in range(repeats + 2):
        for call, seen in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if i >= 2:  # two rounds of warming up
                seen.append(time.perf_counter() - start)
    return [statistics.median(seen) for seen in times]


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 4, 32, 32, generator=generator), torch.randint(0, 1000, (BATCH,), generator=generator)


class Ours:
    def __init__(self, model: DiT) -> None:
        self.model, self.generator = model, torch.Generator().manual_seed(0)
        self.reg = Dispersive.from_preset(model, "official-pytorch", at="blocks.2")
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        self.ema, self.data = EMA(model), batch(self.generator)
        self.z = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)

    def step(self) -> None:
        with self.reg:
            loss, aux = FlowMatching()(self.model, *self.data, generator=self.generator)
        (loss + self.reg.loss(t=aux.t)).backward()
        self.update()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model)

    def outside(self) -> None:
        self.reg.loss(taps=[self.z]).backward()
        self.z.grad = None
        fill_gradients(self.model)
        self.update()


def plain_attention(attention: Any, x: Tensor, rope: None) -> Tensor:
    B, N, D = x.shape
    q, k, v = attention.qkv(x).reshape(B, N, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q * (D // HEADS) ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
    return attention.proj((weights @ v).transpose(1, 2).reshape(B, N, D))


class PublicStyle:
    def __init__(self, model: DiT, plain: bool) -> None:
        for block in model.blocks if plain else ():
            block.attn.forward = partial(plain_attention, block.attn)
        self.model, self.generator = model, torch.Generator().manual_seed(0)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
        self.ema, self.data = copy.deepcopy(model).requires_grad_(False), batch(self.generator)
        self.z, self.running = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True), 0.0
        model.blocks[2].register_forward_hook(lambda module, inputs, out: setattr(self, "tapped", out))

    def step(self) -> None:
        x0, y = self.data
        t, eps = torch.rand(BATCH, generator=self.generator), torch.randn(x0.shape, generator=self.generator)
        s = t.view(-1, 1, 1, 1)
        loss = F.mse_loss(self.model((1 - s) * x0 + s * eps, t, y), eps - x0)
        self.update(loss + 0.25 * self.dispersive(self.tapped))

    @staticmethod
    def dispersive(z: Tensor) -> Tensor:
        z = z.reshape(len(z), -1)
        d = F.pdist(z) ** 2 / z.shape[1]
        d = torch.cat([d, d, torch.zeros(len(z))])
        return torch.log(torch.exp(-d).mean())

    def update(self, loss: Tensor, filled: bool = False) -> None:
        if not filled:
            self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            averaged = dict(self.ema.named_parameters())
            for name, p in self.model.named_parameters():
                averaged[name].mul_(0.9999).add_(p.data, alpha=1 - 0.9999)
        self.running += loss.item()

    def outside(self) -> None:
        fill_gradients(self.model)
        self.update(0.25 * self.dispersive(self.z), filled=True)
        self.z.grad = None
        self.optimizer.zero_grad()


def fill_gradients(model: DiT) -> None:
    """Stand in for the model's backward pass, at no cost worth naming."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = zeros_of(p)


def zeros_of(p: Tensor, cache: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006  (the cache is meant to live on)
    return cache.setdefault(id(p), torch.zeros_like(p))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--compile", action="store_true", help="compile each block in both")
    args = parser.parse_args()
    repeats = 3 if args.quick else 11
    models = [build_dit("DiT-S/4") for _ in range(3)]
    if args.compile:
        for block in (block for model in models for block in model.blocks):
            block.compile()
    ours, theirs, same = Ours(models[0]), PublicStyle(models[1], plain=True), PublicStyle(models[2], plain=False)
    a, b, s, products = interleaved([ours.step, theirs.step, same.step, matrix_products()], repeats)
    c, d = interleaved([ours.outside, theirs.outside], repeats)
    print(
        f"DiT-S/4, batch {BATCH}, torch {torch.__version__}, {torch.get_num_threads()} threads, compile={args.compile}"
    )
    for what, got, wanted in [
        ("step / step in the public style", f"{a:.3f} s / {b:.3f} s = {a / b:.3f}", "at most 0.92"),
        ("  the kit's network in both", f"{a:.3f} s / {s:.3f} s = {a / s:.3f}", ""),
        ("outside forward and backward", f"{1e3 * c:.1f} ms / {1e3 * d:.1f} ms = {c / d:.3f}", "at most 0.333"),
        ("matrix products alone / our step", f"{products:.3f} s / {a:.3f} s = {products / a:.3f}", "at least 0.60"),
    ]:
        print(f"{what:36s} {got:36s} {wanted}")


if __name__ == "__main__":
    main()
