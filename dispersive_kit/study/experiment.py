"""A study run from its plan: every run trained, measured and kept, so that a killed study goes on where it was.

OUT/confirmation/ARM/CONDITION/seed=K/{training/, result.json}
OUT/results.json     all runs and the verdicts, which the report and the notebooks read

A run is skipped where its result carries the plan's hash. Each run computes with one thread, so that its numbers
do not depend on how many go on at once.
"""

import dataclasses
import time
import warnings
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from dispersive_kit.data.files import lock, read_json, write_json
from dispersive_kit.errors import CheckpointError, ConfigError, DataError, KitError
from dispersive_kit.study.environment import describe_environment
from dispersive_kit.study.execute import lock_of
from dispersive_kit.study.measures import measure_run
from dispersive_kit.study.notebook import runs_folder
from dispersive_kit.study.plan import Cell, Plan
from dispersive_kit.study.sweep import in_pool, visible_gpus
from dispersive_kit.study.tuning import choose
from dispersive_kit.training import train


@dataclasses.dataclass(frozen=True)
class Ended:
    """One run that came to its end, now or before (`skipped`)."""

    cell: Cell
    result: dict[str, Any]
    skipped: bool


def study_folder(plan: Plan) -> Path:
    """Where the runs of a plan lie: another plan, or the same one changed, has another folder."""
    return runs_folder() / "studies" / f"{plan.name}-{plan.sha256[:8]}"


def run_study(plan: Plan, out: Path, *, workers: int = 1, data_dir: str | None = None) -> Iterator[Ended]:
    """Run what is not done yet, tuning first; yields each run as it ends.

    Raises:
        ConfigError: no worker. KitError: a run could not be brought to its end (a lost worker, no data, a full disk);
            what is done is kept.
    """
    if workers < 1:
        raise ConfigError(f"{workers} workers cannot run anything: --workers takes 1 or more")
    yield from _run_cells(plan, plan.tuning_cells(), out, workers, data_dir)
    chosen = choose(plan, collect(plan, plan.tuning_cells(), out))
    yield from _run_cells(plan, plan.cells(chosen), out, workers, data_dir)


def _run_cells(plan: Plan, cells: list[Cell], out: Path, workers: int, data_dir: str | None) -> Iterator[Ended]:
    done = [cell for cell in cells if is_done(plan, cell, out)]
    yield from (Ended(cell, read_json(_file(cell, out), default={}), True) for cell in done)
    waiting = [cell for cell in cells if cell not in done]
    if not waiting:
        return
    call = partial(run_cell, plan, out=out, data_dir=data_dir)
    for cell, future in in_pool(call, waiting, min(workers, len(waiting)), visible_gpus()):
        try:
            yield Ended(cell, future.result(), False)
        except (KitError, OSError, RuntimeError) as error:
            raise KitError(
                f"{cell.name} could not be run ({type(error).__name__}: {error}). Runs that ended are kept: put it "
                "right and give the same command again"
            ) from error


def run_cell(plan: Plan, cell: Cell, *, out: Path, data_dir: str | None = None) -> dict[str, Any]:
    """Train and measure one run, going on where it was killed; returns and keeps its result."""
    folder = out / cell.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(lock_of(folder)):
        if is_done(plan, cell, out):
            return read_json(_file(cell, out), default={})
        torch.set_num_threads(1)
        config = plan.config(cell).changed(data_dir=data_dir)
        started, cpu = time.perf_counter(), time.process_time()
        measured = _train_and_measure(plan, config, folder / "training")
        result = {
            "plan_sha256": plan.sha256,
            "arm": cell.arm,
            "condition": cell.condition,
            "seed": cell.seed,
            "stage": cell.stage,
            "settings": cell.settings,
            **measured,
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "environment": _environment(),
        }
        write_json(_file(cell, out), result)
        return result


def _train_and_measure(plan: Plan, config: Any, folder: Path) -> dict[str, Any]:
    """What was measured; of a training that broke down, its error: that is a result too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for _ in train(config, folder, resume=True):
                pass
            measured = {"status": "ok", "error": "", **measure_run(folder, config, plan.evaluation)}
        except (DataError, CheckpointError, ConfigError):  # not the fault of the arm
            raise
        except KitError as error:
            said = str(error).partition(". ")[0]  # what goes on with paths of this machine and advice
            measured = {"status": "crashed", "error": said, "values": {}, "described": {}, "record": {}}
    return {**measured, "warnings": sorted({str(w.message) for w in caught if "Dispersive Loss" in str(w.message)})}


@cache
def _environment() -> dict[str, Any]:
    return describe_environment()


def _file(cell: Cell, out: Path) -> Path:
    return out / cell.name / "result.json"


def is_done(plan: Plan, cell: Cell, out: Path) -> bool:
    """Whether the run has ended, from this plan and these settings."""
    result = read_json(_file(cell, out), default={})
    return (result.get("plan_sha256"), result.get("settings")) == (plan.sha256, cell.settings)


def collect(plan: Plan, cells: list[Cell], out: Path) -> list[dict[str, Any]]:
    """The results of all cells, in their order.

    Raises:
        DataError: some are missing: n was fixed in the plan, so there is no verdict on fewer.
    """
    if missing := [cell.name for cell in cells if not is_done(plan, cell, out)]:
        raise DataError(
            f"{len(missing)} of {len(cells)} runs of {plan.name} are not done ({missing[0]}, ...), and its number of "
            f"seeds is fixed: go on with dispersive-kit study run {plan.called}"
        )
    return [read_json(_file(cell, out), default={}) for cell in cells]
