"""Cost of measuring: `python tests/benchmarks/bench_evaluation.py [--quick] [--data-dir DIR]`.

First the Frechet distance of two sets of 256 features of width 512, against a matrix square root by SciPy of the
product of the covariances, in turns, and how far the two are apart: CPU seconds of one thread, so that other load on
the machine counts for neither. Then 2,000 CIFAR-10 images end to end: features by
EfficientNet-Lite0, 64 principal components of them, and the whole panel with intervals and floors.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from threadpoolctl import threadpool_limits

from dispersive_kit.data import load_images
from dispersive_kit.errors import DataError
from dispersive_kit.evaluation import Panel, frechet_distance, make_extractor, table

WIDTH, ROWS = 512, 256


def by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    """The formula as most code has it."""
    covariance_x, covariance_y = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(covariance_x @ covariance_y)
    shift = x.mean(0) - y.mean(0)
    return float(shift @ shift + np.trace(covariance_x) + np.trace(covariance_y) - 2 * np.trace(root).real)


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def bench_frechet(repeats: int) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(ROWS, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5 for _ in range(2))
    ways = {"frechet_distance": frechet_distance, "scipy sqrtm": by_sqrtm}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with threadpool_limits(1):
        for _ in range(repeats + 1):
            for name, way in ways.items():
                times[name].append(cpu_seconds(lambda way=way: way(x, y)))
    ours, theirs = (statistics.median(times[name][1:]) for name in ways)
    apart = abs(frechet_distance(x, y) / by_sqrtm(x, y) - 1)
    print(f"Frechet distance, n = {ROWS}, D = {WIDTH}: {1000 * ours:.0f} ms, sqrtm {1000 * theirs:.0f} ms")
    print(f"  {theirs / ours:.1f} times faster (goal 8), relative difference {apart:.1e} (goal 1e-6)")


def bench_panel(n: int, data_dir: str | None) -> None:
    try:
        train, test = (load_images("cifar10", split, data_dir=data_dir, download=False) for split in ("train", "test"))
    except DataError as error:
        return print(f"end to end: left out, {error}")
    reference, started = test.subset(torch.arange(n)), time.perf_counter()
    extractor = make_extractor("effnet-lite0-pca64", train, test)
    fitted = time.perf_counter()
    panel = Panel(extractor, train.subset(torch.arange(n, 2 * n)), reference)
    ready = time.perf_counter()
    records = panel.measure(train.images[-n:])
    done = time.perf_counter()
    print(f"{n} CIFAR-10 images against {n}, {torch.get_num_threads()} threads: {done - started:.0f} s in all")
    print(f"  PCA on 2,000 images {fitted - started:.0f} s, reference {ready - fitted:.0f} s, samples, floor and panel "
          f"{done - ready:.0f} s\n{table(records)}")  # fmt: skip
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repeat, 200 images")
    parser.add_argument("--data-dir", help="folder in which cifar10 lies")
    args = parser.parse_args()
    bench_frechet(1 if args.quick else 7)
    bench_panel(200 if args.quick else 2000, args.data_dir)


if __name__ == "__main__":
    main()
