"""How long a run will take and what it will hold in memory: from runs that were measured, or no estimate."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dispersive_kit.study.sweep import Task

# Written by tests/benchmarks/measure_notebooks.py: notebook -> mode -> seconds, peak_gib.
TABLE = Path(__file__).with_name("estimates.json")


@cache
def measured() -> dict[str, Any]:
    """What was measured, and on what machine."""
    return json.loads(TABLE.read_text())


def estimate(stages: Sequence[Sequence[Task]], workers: int = 1) -> str:
    """One sentence on the time of all stages, `workers` runs of one stage at once, and on the memory they take.

    A run in a mode that was never measured is named as one without an estimate, and is in none of the sums.
    """
    table, unknown = measured(), set()
    seconds, gib = 0.0, 0.0
    for tasks in stages:
        mode, notebook = str(tasks[0].parameters.get("mode", "class")), tasks[0].notebook.stem
        known = table["notebooks"].get(notebook, {}).get(mode)
        if known is None:
            unknown.add(f"{notebook} in {mode} mode")
            continue
        at_once = min(workers, len(tasks))
        seconds += known["seconds"] * -(-len(tasks) // at_once)
        gib = max(gib, known["peak_gib"] * at_once)
    parts = [f"about {_duration(seconds)} and {gib:.1f} GiB (measured on {table['machine']})"] if seconds else []
    parts += [f"no estimate for {', '.join(sorted(unknown))}"] if unknown else []
    return f"estimate: {'; '.join(parts)}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
