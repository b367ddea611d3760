"""Calls timed in turns in one run, so that other load on the machine meets all alike."""

import argparse
import statistics
import time
from collections.abc import Callable


def is_quick(doc: str | None) -> bool:
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds")
    return parser.parse_args().quick


def in_turns(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each call; the first round, beyond `rounds`, warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def row(what: str, got: str, wanted: str = "") -> None:
    print(f"{what:46s} {got:>36s}   {wanted}", flush=True)
