"""Cost of the Frechet distance: `python tests/benchmarks/bench_evaluation.py [--quick]`.

Of two sets of 256 features of width 512, against a matrix square root by SciPy of the product of the covariances, and
how far the two are apart: CPU seconds of one thread, so that other load on the machine counts for neither.
"""

import time

import numpy as np
import scipy.linalg
from threadpoolctl import threadpool_limits
from timing import in_turns, is_quick, row

from dispersive_kit.evaluation import frechet_distance

WIDTH, ROWS = 512, 256


def by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    """The formula as most code has it."""
    covariance_x, covariance_y = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(covariance_x @ covariance_y)
    shift = x.mean(0) - y.mean(0)
    return float(shift @ shift + np.trace(covariance_x) + np.trace(covariance_y) - 2 * np.trace(root).real)


def main() -> None:
    rounds, rng = 1 if is_quick(__doc__) else 7, np.random.default_rng(0)
    x, y = (rng.normal(size=(ROWS, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5 for _ in range(2))
    with threadpool_limits(1):
        ways = {"kit": lambda: frechet_distance(x, y), "sqrtm": lambda: by_sqrtm(x, y)}
        took = in_turns(ways, rounds, time.process_time)
    theirs, ours = 1e3 * took["sqrtm"], 1e3 * took["kit"]
    got = f"{theirs:.0f} ms / {ours:.0f} ms = {theirs / ours:.1f} x"
    row(f"scipy sqrtm / frechet_distance, n {ROWS}, D {WIDTH}", got, "at least 8 x")
    row("  relative difference", f"{abs(frechet_distance(x, y) / by_sqrtm(x, y) - 1):.1e}", "at most 1e-6")


if __name__ == "__main__":
    main()
