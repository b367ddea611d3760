"""What the block x log-SNR map costs: `python tests/benchmarks/bench_analysis.py [--quick]`.

A 12-block Tiny model, all blocks, 6 levels, 2,000 images: every measure that needs neither gradients nor several draws
of noise, with its Gaussian null, against the bare forward passes (no taps, noise made beforehand) of the same images
and levels. In turns, in one run, for the mean over tokens and for all tokens, whose components are fitted first. CPU
seconds of one thread, so that other load on the machine counts for neither.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch

from dispersive_kit.analysis import LEVELS, noisy, random_network, sweep
from dispersive_kit.data import ImageSet
from dispersive_kit.models import build_dit


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def images(n: int, channels: int, size: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n, channels, size, size), generator=generator, dtype=torch.uint8)
    return ImageSet("noise", "train", pixels, torch.arange(n) % 10, tuple("0123456789"), "bench")


def bench(what: str, model_name: str, data: ImageSet, repeats: int) -> None:
    channels, size = data.images.shape[1:3]
    model = build_dit(model_name, depth=12, input_size=size, in_channels=channels, num_classes=10)
    model = random_network(model).requires_grad_(False)
    inputs = [(x, t, torch.full((len(x),), model.null_label)) for _, _, x, t in noisy(data.images)]

    def bare() -> None:
        with torch.no_grad():
            for x, t, y in inputs:
                model(x, t, y)

    for pool, most in {"mean": 1.5, "tokens": 3.0}.items():
        calls = (bare, lambda pool=pool: sweep(model, data, pool=pool))
        pairs = [[cpu_seconds(call) for call in calls] for _ in range(repeats)]
        ratio = statistics.median(whole / part for part, whole in pairs)
        part, whole = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(f"{what}, {pool:6s} bare {part:6.1f} s, map {whole:6.1f} s: {ratio:.3f} x   at most {most} x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="256 images, one round")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    n, repeats = (256, 1) if quick else (2000, 3)
    levels = sum(level != math.inf for level in LEVELS)
    print(f"12 blocks, {levels} log-SNR levels and clean, {n} images, torch {torch.__version__}")
    bench("DiT-T/4 on 3 x 32 x 32, 64 tokens", "DiT-T/4", images(n, 3, 32), repeats)
    bench("DiT-T/2 on 1 x 8 x 8, 16 tokens", "DiT-T/2", images(n, 1, 8), repeats)


if __name__ == "__main__":
    main()
