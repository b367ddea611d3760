"""Tuning with equal trials for every arm, on seeds that are not used again."""

import math
from typing import Any

from dispersive_kit.study.plan import Plan
from dispersive_kit.study.verdict import CRASH

Chosen = dict[str, dict[str, dict[str, Any]]]  # condition -> arm -> settings


def choose(plan: Plan, results: list[dict[str, Any]]) -> Chosen:
    """For each condition and arm, the trial with the lowest mean log of the Frechet distance over the tuning seeds.

    A crashed trial counts as ten times the worst value of its arm. Without tuning: nothing is chosen.
    """
    chosen: Chosen = {}
    for condition in plan.conditions:
        for arm, trials in plan.tuning["trials"].items():
            scores = [_scores(results, f"{arm}.{k}", condition) for k in range(len(trials))]
            worst = max((s for trial in scores for s in trial if s is not None), default=0.0)
            means = [sum(worst + CRASH if s is None else s for s in trial) / len(trial) for trial in scores]
            chosen.setdefault(condition, {})[arm] = trials[means.index(min(means))]
    return chosen


def _scores(results: list[dict[str, Any]], arm: str, condition: str) -> list[float | None]:
    runs = [r for r in results if (r["arm"], r["condition"]) == (arm, condition)]
    return [math.log(r["values"]["frechet"]) if r["status"] == "ok" else None for r in runs]
