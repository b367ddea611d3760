"""Speed and memory of Dispersive Loss: `python tests/benchmarks/bench_loss.py [--quick]`.

The alternative is the released code's form (pdist, squared over dim, both orders, B zeros, log-mean-exp), timed in
turns. Memory is the process's peak (Linux), above the features and their gradient.
"""

import ctypes
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import in_turns, is_quick, row
from torch import Tensor

from dispersive_kit.diffusion.objectives import FlowMatching
from dispersive_kit.models import build_dit
from dispersive_kit.regularizers import Dispersive, dispersive_loss


def released(z: Tensor, tau: float = 0.5) -> Tensor:
    z = z.reshape(len(z), -1)
    d = F.pdist(z).pow(2) / z.shape[1]
    return torch.exp(-torch.cat([d, d, torch.zeros(len(z))]) / tau).mean().log()


def memory(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak_above(z: Tensor) -> int:
    """Bytes beyond z and its gradient that forward and backward need at their peak."""
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would hide in the peak
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory("VmRSS")
    torch.autograd.grad(dispersive_loss(z), z)
    return memory("VmHWM") - before - z.numel() * z.element_size()


def bench_speed(shape: tuple[int, ...], rounds: int) -> None:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    forms = {"released": released, "kit": dispersive_loss}
    took = in_turns({name: lambda f=f: torch.autograd.grad(f(z), z) for name, f in forms.items()}, rounds)
    theirs, ours = took["released"], took["kit"]
    above = peak_above(z) / (z.numel() * z.element_size())
    row(f"forward + backward {shape}", f"{theirs:.3f} s / {ours:.4f} s = {theirs / ours:.1f} x", "at least 7 x")
    row("  peak memory above z and its gradient", f"{above:.2f} x z", "at most 1.5 x")


def bench_share(rounds: int) -> None:
    """The loss with its own backward, statistics and checks, against the whole step of DiT-S/4 at batch 32."""
    model = build_dit("DiT-S/4").train()
    reg = Dispersive.from_preset(model, "paper")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 4, 32, 32, generator=generator), torch.randint(0, 1000, (32,), generator=generator)
    leaf = torch.randn(32, 64, 384, generator=generator).requires_grad_()

    def step() -> None:
        with reg:
            loss, aux = FlowMatching()(model, x, y, generator=generator)
        optimizer.zero_grad()
        (loss + reg.loss(t=aux.t)).backward()
        optimizer.step()

    took = in_turns({"step": step, "loss": lambda: reg.loss(taps=[leaf]).backward()}, rounds)
    part, whole = took["loss"], took["step"]
    share = f"{1e3 * part:.2f} ms / {whole:.3f} s = {100 * part / whole:.2f} %"
    row("share of a DiT-S/4 step, batch 32, 4x32x32", share, "at most 0.5 %")


def bench_large(B: int, D: int) -> None:
    z = torch.randn(B, D).requires_grad_()
    start = time.perf_counter()
    above = peak_above(z)
    row(f"B = {B}, D = {D}: memory above z and its gradient", f"{above / 2**30:.2f} GiB", "under 1 GiB")
    row("  time, in blocks of rows", f"{time.perf_counter() - start:.1f} s")


def main() -> None:
    quick = is_quick(__doc__)
    print(f"Dispersive Loss, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for shape in [(256, 64, 384), (256, 256, 768)][: 1 if quick else 2]:
        bench_speed(shape, 3 if quick else 9)
    bench_share(2 if quick else 9)
    bench_large(*((6_000, 512) if quick else (16_384, 4096)))


if __name__ == "__main__":
    main()
