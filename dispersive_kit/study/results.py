"""What a study found: its runs in one JSON file, and the verdicts that follow from plan and runs alone."""

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dispersive_kit.data.files import write_json
from dispersive_kit.errors import DataError
from dispersive_kit.study.experiment import collect, study_folder
from dispersive_kit.study.plan import Contrast, Plan, load_plan, shipped_plans, studies_folder
from dispersive_kit.study.tuning import choose
from dispersive_kit.study.verdict import (
    DIRECTION,
    INACTIVE,
    holm,
    judge_pairs,
    log_ratios,
    sign_flip_p,
)

Run = dict[str, Any]
KEPT = ("arm", "condition", "seed", "status", "error", "settings", "values", "described", "warnings", "cpu_seconds")


def conclude(plan: Plan, out: Path) -> dict[str, Any]:
    """Bring all runs of a plan together, write OUT/results.json, and return its content.

    Raises:
        DataError: runs are missing, or were measured against other real images or by another extractor.
    """
    tuning = collect(plan, plan.tuning_cells(), out)
    chosen = choose(plan, tuning)
    runs = collect(plan, plan.cells(chosen), out)
    results = {
        "plan": plan.name,
        "plan_sha256": plan.sha256,
        "title": plan.title,
        "question": plan.question,
        "reference": plan.reference,
        "cpu_hours": {"planned": plan.cpu_hours, "used": round(sum(r["cpu_seconds"] for r in tuning + runs) / 3600, 2)},
        "verdicts": verdicts(plan, runs),
        "summary": summary(plan, runs),
        "chosen": chosen,
        "record": _shared_record(runs),
        "environments": _environments(tuning + runs),
        "runs": [_kept(plan, run) for run in runs],
        "tuning": [_kept(plan, run) for run in tuning],
    }
    write_json(out / "results.json", results)
    return results


def load_results(plan: Plan, out: Path | None = None) -> dict[str, Any]:
    """Results of a plan: of the runs in `out` and no others, or, without it, of the study run here, or else those that
    come with the kit.

    Raises:
        DataError: there are none, or they are damaged, or of the plan as it was before a change.
    """
    files = [study_folder(plan) / "results.json", _shipped_file(plan)] if out is None else [out / "results.json"]
    for file in files:
        if file.is_file():
            return _read_results(plan, file)
    where = "" if out is None else f" in {out}"
    raise DataError(f"{plan.name} has no results{where} yet: dispersive-kit study run {plan.called}")


@functools.cache
def shipped_results() -> dict[str, dict[str, Any]]:
    """The results that come with the kit, by the name of their plan, whatever was run here; to be read only.

    Raises:
        DataError: some are of their plan as it was before a change.
    """
    plans = map(load_plan, shipped_plans())
    return {plan.name: _read_results(plan, _shipped_file(plan)) for plan in plans if _shipped_file(plan).is_file()}


def _shipped_file(plan: Plan) -> Path:
    return studies_folder() / f"{plan.name}.results.json"


def _read_results(plan: Plan, file: Path) -> dict[str, Any]:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        of_plan = results["plan_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error!r}): dispersive-kit study run {plan.called} writes it") from error
    if of_plan != plan.sha256:
        raise DataError(
            f"{file} holds results of plan {of_plan[:8]}, and {plan.file} is now "
            f"{plan.sha256[:8]}: a plan is not changed after its runs; give the new one another name"
        )
    return results


def run_id(plan_sha256: str, run: Run) -> str:
    """The name under which a claim refers to a run."""
    return f"{plan_sha256[:8]}/{run['arm']}/{run['condition']}/seed={run['seed']}"


def verdicts(plan: Plan, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One verdict a contrast of the plan: primary and co-primary alone, secondaries adjusted together."""
    adjusted = holm([sign_flip_p(_pairs(plan, runs, c)) for c in plan.secondaries])
    roles = [("primary", None), ("co-primary", None), *(("secondary", p) for p in adjusted)]
    found = []
    for contrast, (role, p) in zip(plan.contrasts, roles, strict=True):
        better, margin = _direction(contrast), plan.margin[_kind(contrast.measure)]
        pairs, empty = _pairs(plan, runs, contrast), _empty_pairs(plan, runs, contrast)
        verdict = judge_pairs(pairs, better=better, margin=margin, p_adjusted=p, empty=empty)
        flags = _flags(runs, contrast, plan.reference)
        found.append({"role": role, **dataclasses.asdict(contrast), **dataclasses.asdict(verdict), **flags})
    return found


def _sides(plan: Plan, runs: Sequence[Run], contrast: Contrast) -> list[list[float | None]]:
    """Values of the arm and of the reference, seed by seed; None of a crashed run."""
    return [_values(runs, a, contrast.condition, contrast.measure) for a in (contrast.arm, plan.reference)]


def _pairs(plan: Plan, runs: Sequence[Run], contrast: Contrast) -> Any:
    arm, reference = _sides(plan, runs, contrast)
    return log_ratios(arm, reference, _direction(contrast))


def _empty_pairs(plan: Plan, runs: Sequence[Run], contrast: Contrast) -> int:
    return sum(pair == (None, None) for pair in zip(*_sides(plan, runs, contrast), strict=True))


def _values(runs: Sequence[Run], arm: str, condition: str, measure: str) -> list[float | None]:
    chosen = sorted(_of(runs, arm, condition), key=lambda run: run["seed"])
    return [run["values"].get(measure) for run in chosen]


def _of(runs: Sequence[Run], arm: str, condition: str) -> list[Run]:
    return [run for run in runs if (run["arm"], run["condition"]) == (arm, condition)]


def _kind(measure: str) -> str:
    """ "frechet cfg 2" is a frechet."""
    return measure.partition(" ")[0]


def _direction(contrast: Contrast) -> int:
    return DIRECTION[_kind(contrast.measure)]


def _flags(runs: Sequence[Run], contrast: Contrast, reference: str) -> dict[str, Any]:
    """How many runs of each side crashed, and whether the arm's regulariser pulled at all."""
    own, other = (_of(runs, arm, contrast.condition) for arm in (contrast.arm, reference))
    ratios = [run["described"]["gradient_ratio"] for run in own if run["status"] == "ok"]
    ratio = statistics.median(ratios) if ratios else None
    return {
        "crashes": sum(run["status"] == "crashed" for run in own),
        "reference_crashes": sum(run["status"] == "crashed" for run in other),
        "gradient_ratio": ratio,
        "inactive": ratio is not None and ratio < INACTIVE,
    }


def summary(plan: Plan, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each condition and arm: geometric mean and spread between seeds of each value, medians of the rest."""
    return [
        {"condition": condition, "arm": arm, **_summary([r for r in _of(runs, arm, condition) if r["status"] == "ok"])}
        for condition in plan.conditions
        for arm in plan.arms
    ]


def _summary(ended: Sequence[Run]) -> dict[str, Any]:
    if not ended:
        return {"n": 0, "values": {}, "described": {}}
    first = ended[0]
    values = {name: _spread([run["values"][name] for run in ended]) for name in first["values"]}
    everywhere = set.intersection(*(set(run["described"]) for run in ended))
    names = [name for name in first["described"] if name in everywhere]
    described = {name: statistics.median(run["described"][name] for run in ended) for name in names}
    return {"n": len(ended), "values": values, "described": described}


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    logs = [math.log(value) for value in values]
    return {"mean": math.exp(statistics.fmean(logs)), "sd_log": statistics.stdev(logs) if len(logs) > 1 else None}


def _shared_record(runs: Sequence[Run]) -> dict[str, Any]:
    """What all runs say of how they were measured.

    Raises:
        DataError: reference or extractor differ, or, within a condition, the training images.
    """
    ended = [run for run in runs if run["status"] == "ok"]
    records = [run["record"] for run in ended]
    if not records:
        return {}
    for name in ("reference", "extractor", "data_sha256"):
        first: dict[str, Any] = {}
        for run in ended:  # a share of the training images may be a condition
            place = run["condition"] if name == "data_sha256" else ""
            if first.setdefault(place, run["record"][name]) != run["record"][name]:
                raise DataError(f"runs of one study were measured with different {name}: they cannot be compared")
    return {name: value for name, value in records[0].items() if all(r.get(name) == value for r in records)}


def _environments(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The states of code and machine in which runs were made, each with their number."""
    found: list[dict[str, Any]] = []
    for run in runs:
        same = next((one for one in found if {**one, "runs": 0} == {**run["environment"], "runs": 0}), None)
        if same is None:
            found.append(same := {**run["environment"], "runs": 0})
        same["runs"] += 1
    return found


def _kept(plan: Plan, run: Run) -> Run:
    return {"id": run_id(plan.sha256, run), **{name: run[name] for name in KEPT}}
