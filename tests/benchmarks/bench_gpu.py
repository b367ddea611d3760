"""What the kit costs on a GPU, in one run of eight minutes at most: `python tests/benchmarks/bench_gpu.py`.

Needs PyTorch alone. The alternatives are the public forms: network and step of `public_style.py`, pdist, guidance at
every step. What is compared takes turns, and a number is the median of its rounds; the peak is that of a large product
in the same run. `--device cpu --tiny` runs every line at toy size; those numbers say nothing.
"""

import argparse
import contextlib
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from public_style import PublicSiT, PublicStyle, dispersive
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dispersive_kit.diffusion.guidance import ClassifierFree
from dispersive_kit.diffusion.objectives import FlowMatching
from dispersive_kit.diffusion.samplers import heun, initial_noise, time_grid
from dispersive_kit.models.dit import DIT_CONFIGS, build_dit
from dispersive_kit.regularizers import Dispersive, dispersive_loss

LATENT = (4, 32, 32)
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    models: tuple[str, ...] = ("DiT-B/2", "DiT-S/2")
    batch: int = 256
    steps: int = 4  # of training in a round
    matrix: int = 8192
    features: tuple[tuple[int, ...], ...] = ((256, 256, 768), *((2**k, 4096) for k in range(5, 15)))
    images: int = 64
    num_steps: int = 10
    seconds: float = 60.0  # of rounds in each part, a twelfth of it for each size of the loss


TINY = Sizes(("DiT-T/8",), 4, 1, 64, ((4, 16, 96), (32, 8)), 2, 3, 0.0)


@dataclass
class Taken:
    """Of one call: seconds in each round, GiB at its peak above what was there before, or why it failed."""

    seconds: list[float] = field(default_factory=list)
    memory: float | None = None
    fault: str = ""


def in_turns(calls: dict[Any, Callable[[], object]], seconds: float, device: torch.device) -> dict[Any, Taken]:
    """Rounds in which all calls take turns: two to warm up, then 3 to 30, as fit in `seconds`."""
    cuda, end, taken = device.type == "cuda", math.inf, {name: Taken() for name in calls}
    for number in range(-2, 30):
        end = time.perf_counter() + seconds if number == 0 else end
        if number >= 3 and time.perf_counter() > end:
            break
        for name in (name for name, one in taken.items() if not one.fault):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            before, start = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
            try:
                calls[name]()
                torch.cuda.synchronize() if cuda else None
            except RuntimeError as error:  # out of memory, or more pairs than pdist can take
                taken[name] = Taken(fault=str(error).splitlines()[0][:90])
                continue
            taken[name].seconds += [time.perf_counter() - start] if number >= 0 else []
            taken[name].memory = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None
    return taken


class Kit:
    """The kit's step as its training takes it, with the recipe of the ImageNet presets."""

    def __init__(self, model: nn.Module, compiled: bool, device: torch.device) -> None:
        self.weight = 0.5  # 0: without the loss
        self.model, self.average = model.train(), copy.deepcopy(model).requires_grad_(False)
        self.reg, self.generator = Dispersive.from_preset(model, "paper"), torch.Generator(device).manual_seed(0)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        for block in model.blocks if compiled else ():
            block.compile(backend="inductor" if device.type == "cuda" else "eager")

    def step(self, x0: Tensor, y: Tensor) -> None:
        with self.reg if self.weight else contextlib.nullcontext():
            loss, aux = FlowMatching()(self.model, x0, y, generator=self.generator)
        (loss + self.reg.loss(t=aux.t, y=y) if self.weight else loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1e-4)


def operations(name: str) -> int:
    """Of one image, forward and backward, counted on shapes alone."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x, t, y = torch.zeros(1, *LATENT), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        build_dit(name)(x, t, y).sum().backward()
    return counter.get_total_flops()


def bench_training(name: str, peak: float, sizes: Sizes, device: torch.device) -> list[Row]:
    def prepared(model: nn.Module) -> nn.Module:
        model.to(device).forward = torch.autocast(device.type, torch.bfloat16)(model.forward)  # as Accelerate does it
        return model

    size, patch = name.split("/")
    depth, width, heads = (DIT_CONFIGS[size][key] for key in ("depth", "hidden_size", "num_heads"))
    arms = {
        "kit, compiled blocks": Kit(prepared(build_dit(name)), True, device),
        "kit": Kit(prepared(build_dit(name)), False, device),
        "public": PublicStyle(prepared(PublicSiT(int(patch), depth, width, heads)), max(1, depth // 4) - 1, 0.5),
    }
    x0, y = torch.randn(sizes.batch, *LATENT, device=device), torch.randint(1000, (sizes.batch,), device=device)

    def steps(arm: str, disperse: bool) -> None:
        arms[arm].weight = 0.5 * disperse
        for _ in range(sizes.steps):
            arms[arm].step(x0, y)

    calls = {(arm, d): lambda arm=arm, d=d: steps(arm, d) for arm in arms for d in (False, True)}
    taken, rows = in_turns(calls, sizes.seconds, device), []
    for (arm, disperse), one in taken.items():
        more: Row = {"fails": one.fault or None, "GiB": one.memory}
        bare, public = taken[arm, False].seconds, taken["public", disperse].seconds
        if times := one.seconds:
            more["share of the peak"] = operations(name) * sizes.batch * sizes.steps / median(times) / peak
        if times and bare and disperse:
            more["loss's share of the step"] = median((b - a) / b for a, b in zip(bare, times, strict=True))
        if times and public:
            more["times as fast as the public one"] = median(b / a for a, b in zip(times, public, strict=True))
        what = f"{name}, batch {sizes.batch}, step, {arm}{' + loss' if disperse else ''}"
        rows.append(row(what, 1e3 * median(times) / sizes.steps if times else None, "ms", **more))
    return rows


def bench_sampling(name: str, sizes: Sizes, device: torch.device) -> list[Row]:
    """Heun from noise to latents; the kit samples in float32."""
    model = build_dit(name).eval().to(device)
    y, seeds = torch.arange(sizes.images, device=device) % 1000, list(range(sizes.images))
    x, null = initial_noise(seeds, LATENT).to(device), model.null_label
    guided = {
        "no guidance": ClassifierFree(y, null),
        "guided where t is in 0.3..0.8": ClassifierFree(y, null, scale=1.5, low=0.3, high=0.8),
        "guided at every step, the public form": ClassifierFree(y, null, scale=1.5),
    }

    def draw(what: str, half: bool) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return heun(model, x, time_grid(sizes.num_steps), guidance=guided[what])

    calls = {(what, half): lambda w=what, h=half: draw(w, h) for half in (False, True) for what in guided}
    return [
        row(f"{name}, Heun {sizes.num_steps} steps, {'bf16' if half else 'float32'}, {what}",
            sizes.images / median(one.seconds), "images/s")
        for (what, half), one in in_turns(calls, sizes.seconds, device).items()
    ]  # fmt: skip


def bench_loss(shape: tuple[int, ...], sizes: Sizes, device: torch.device) -> Row:
    """Forward and backward of the loss alone, against the released form where that runs."""
    z = torch.randn(shape, device=device).requires_grad_()
    forms = {"kit": lambda: dispersive_loss(z, tau=1.0), "released": lambda: dispersive(z)}
    calls = {name: lambda form=form: torch.autograd.grad(form(), z) for name, form in forms.items()}
    taken = in_turns(calls, sizes.seconds / 12, device)
    kit, released = taken["kit"], taken["released"]
    more: Row = {"GiB": kit.memory, "released, GiB": released.memory, "released fails": released.fault or None}
    if not released.fault:
        more["released, ms"] = 1e3 * median(released.seconds)
        more["times as fast"] = median(released.seconds) / median(kit.seconds)
    return row(f"loss alone, z {'x'.join(map(str, shape))}", 1e3 * median(kit.seconds), "ms", **more)


def row(what: str, value: float | None, unit: str, **more: Any) -> Row:
    """One line, printed at once: a run that ends early leaves what it has."""
    more = {name: number for name, number in more.items() if number is not None}
    said = "; ".join(f"{name} {n if isinstance(n, str) else format(n, '.3g')}" for name, n in more.items())
    print(f"| {what} | {'-' if value is None else format(value, '.4g')} {unit} | {said} |", flush=True)
    return {"what": what, "value": value, "unit": unit, **more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that every line runs")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gpu.json"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        return print("no GPU here: left out (--device cpu --tiny runs it at toy size)")
    device, sizes, started = torch.device(args.device), TINY if args.tiny else Sizes(), time.perf_counter()
    chip = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{chip}, torch {torch.__version__}\n\n| what | value | beside it |\n|---|--:|---|")
    a, b = (torch.randn(sizes.matrix, sizes.matrix, device=device).bfloat16() for _ in range(2))
    product = in_turns({"product": lambda: [a @ b for _ in range(10)]}, sizes.seconds / 12, device)["product"]
    peak = 10 * 2 * sizes.matrix**3 / median(product.seconds)
    rows = [row(f"peak, bf16 product of {sizes.matrix} x {sizes.matrix}", peak / 1e12, "TFLOP/s")]
    for name in sizes.models:
        rows += bench_training(name, peak, sizes, device)
    rows += bench_sampling(sizes.models[0], sizes, device)
    rows += [bench_loss(shape, sizes, device) for shape in sizes.features]
    rows.append(row("all of this", time.perf_counter() - started, "s", goal=480))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"device": chip, "torch": torch.__version__, "rows": rows}, indent=2))
    return print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    main()
