"""Run a study from its plan: train and measure every run, and keep its result, so that a killed study can continue.

OUT/confirmation/ARM/CONDITION/seed=K/{training/, result.json}
OUT/results.json     all runs and the verdicts, which the report and the notebooks read

A run is skipped if its result has the plan's hash. Each run computes with one thread, so that its numbers do not
depend on how many run at once. It is measured at its last step, never at the best of several checkpoints. Only for
early-stopped arms of the plan, the loss on validation images, which no measure uses, chooses the step.
"""

import dataclasses
import json
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache, lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel

from dispersive_kit.analysis import LEVELS, candidates, choose_and_test, encoder, extract
from dispersive_kit.analysis.geometry import rankme, spectrum
from dispersive_kit.data.files import lock, write_json
from dispersive_kit.errors import CheckpointError, ConfigError, DataError, KitError
from dispersive_kit.evaluation import balanced_labels, decoder_of, draw_images, generate, load_reference, make_extractor
from dispersive_kit.evaluation.generate import Decode
from dispersive_kit.evaluation.panel import Panel, measure_memorisation
from dispersive_kit.regularizers import PRESETS
from dispersive_kit.regularizers.taps import block_at
from dispersive_kit.study.machine import describe_environment, in_pool
from dispersive_kit.study.notebook import read_form
from dispersive_kit.study.plan import Cell, Plan
from dispersive_kit.study.verdict import CRASH, Run, summary, verdicts
from dispersive_kit.training import TrainConfig, load_run, read_metrics, train
from dispersive_kit.training.batches import split_share
from dispersive_kit.training.parallel import this_process
from dispersive_kit.training.runs import OBJECTIVES, sampler_of

PROBED, VALIDATED, TESTED, DRAWS = 1000, 300, 500, 3  # images of a linear probe, and draws of noise
# Logged values of the measured step, where finite, by the start of their names; the first three are of its batch.
DESCRIBED = ("feature_rms", "gap", "dispersive", "held_out_t", "depth_use", "validation")
KEPT = ("arm", "condition", "seed", "status", "error", "settings", "values", "described", "warnings", "cpu_seconds")


def run_study(plan: Plan, out: Path, *, workers: int = 1) -> Iterator[tuple[Cell, Run, bool]]:
    """Run what is not done yet, tuning first; yields each run as it ends, its result, and whether it was done before.

    Raises ConfigError: fewer than one worker. KitError: a run could not be finished (a lost worker, no data, a full
        disk); finished runs are kept.
    """
    yield from _run_cells(plan, plan.tuning_cells(), out, workers)
    yield from _run_cells(plan, plan.cells(_choose(plan, _collect(plan, plan.tuning_cells(), out))), out, workers)


def _run_cells(plan: Plan, cells: list[Cell], out: Path, workers: int) -> Iterator[tuple[Cell, Run, bool]]:
    done = {cell.name: result for cell in cells if (result := _result(plan, cell, out))}
    yield from ((cell, done[cell.name], True) for cell in cells if cell.name in done)
    waiting = [cell for cell in cells if cell.name not in done]
    for cell, future in in_pool(partial(_run_cell, plan, out=out), waiting, workers) if waiting else ():
        try:
            yield cell, future.result(), False
        except (KitError, OSError, RuntimeError) as error:
            raise KitError(
                f"{cell.name} could not be run ({type(error).__name__}: {error}). Finished runs are kept: remove "
                "the cause, and give the same command again"
            ) from error


class _Measured(BaseModel, extra="allow"):
    """result.json of a run."""

    plan_sha256: str
    arm: str
    condition: str
    settings: dict[str, Any]
    status: Literal["ok", "crashed"]
    values: dict[str, float]


def _result(plan: Plan, cell: Cell, out: Path) -> Run:
    """The result of a finished run of this plan and these settings; else an empty dictionary."""
    file = out / cell.name / "result.json"
    if not file.is_file():
        return {}
    result: Run = read_form(file, _Measured, str(file), DataError).model_dump()
    return result if (result["plan_sha256"], result["settings"]) == (plan.sha256, cell.settings) else {}


def _run_cell(plan: Plan, cell: Cell, *, out: Path) -> Run:
    """Train and measure one run, and write its result. A killed run continues from its checkpoint."""
    folder = out / cell.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder.with_name(f".{folder.name}.lock")):
        if done := _result(plan, cell, out):
            return done
        torch.set_num_threads(1)
        full = plan.unstopped(cell)  # the same training, if its settings are the same
        training = out / (full if full and _result(plan, full, out) else cell).name / "training"
        started, cpu = time.perf_counter(), time.process_time()
        result = {
            "plan_sha256": plan.sha256,
            **dataclasses.asdict(cell),
            **_train_and_measure(plan, cell, training),
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "environment": _environment(),
        }
        write_json(folder / "result.json", result)
        return result


def _train_and_measure(plan: Plan, cell: Cell, folder: Path) -> dict[str, Any]:
    """What was measured. If the training failed: its error, which is a result too."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        try:
            for _ in train(plan.config(cell), folder, resume=True):
                pass
            measured = {"status": "ok", "error": "", **_measure(plan, cell, folder)}
        except (DataError, CheckpointError, ConfigError):  # not the fault of the arm
            raise
        except KitError as error:
            said = str(error).partition(". ")[0]  # without the rest: paths of this machine, and advice
            measured = {"status": "crashed", "error": said, "values": {}, "described": {}, "record": {}}
    return {**measured, "warnings": sorted({str(w.message) for w in caught if "Dispersive Loss" in str(w.message)})}


_environment = cache(describe_environment)  # once a process


def _measure(plan: Plan, cell: Cell, folder: Path) -> dict[str, Any]:
    """Values by name, descriptive numbers without a verdict, and the record of how they were measured."""
    config, how, lines = plan.config(cell), plan.evaluation, read_metrics(folder)
    last = lines[-1]
    if plan.unstopped(cell):  # its arm is stopped early
        last = min((line for line in lines if "validation" in line), key=lambda line: line["validation"])
    model, card = load_run(folder, step=int(last["step"]))
    if "held_out" not in last:
        raise KitError("the held-out loss of the last step is not finite")
    autoencoder = json.dumps(card["data"].get("autoencoder"))
    panel, decode = _panel(config.data, config.data_dir, config.image_size, how.extractor, autoencoder)
    if how.probe and decode:
        raise ConfigError("a probe needs images, and this run has latents: leave it out of the plan")
    probe = {"probe": _probe_accuracy(model, config, how.probe_pool)} if how.probe else {}
    described = {} if decode or model.null_label is None else {"pooled_rank": _pooled_rank(model, config)}
    model = model.to(this_process().device)
    labels = balanced_labels(how.num, model.num_classes)
    how_drawn: dict[str, Any] = {"sampler": sampler_of(config.objective, how.sampler)[0], "num_steps": how.num_steps}
    if (how.guidance_low, how.guidance_high) != (0, 1):  # otherwise not in the record, as in earlier studies
        how_drawn |= {"guidance_low": how.guidance_low, "guidance_high": how.guidance_high}
    shared = {"weights": card["weights"], "step": card["step"], "first_seed": 0, "labels": "classes in turn",
              "data": card["data"]["name"], "data_sha256": card["data"]["sha256"]}  # fmt: skip
    features, numbers = {}, {}
    for name, scale in how.frechets.items():
        drawn = {**how_drawn, "cfg_scale": scale}
        features[name] = panel.extractor(generate(model, labels, objective=config.objective, decode=decode, **drawn))
        numbers[name] = panel.measure(features[name], protocol={**drawn, **shared})[0]
    values = {**{name: n.value for name, n in numbers.items()}, "held_out": last["held_out"]}
    if how.copies:
        trained_on = split_share(panel.real, config.data_share)[0]
        found = measure_memorisation(features["frechet"], trained_on, panel.reference, panel.extractor).copies
        values["copies"] = (round(found.value * how.num) + 0.5) / (how.num + 1)  # above 0, for the logarithm
        described["copies_of_held_out"] = found.floor
    known = {name: last[name] for name in last if name.startswith(DESCRIBED)}
    if how.curves:
        curves = [name for name in last if name == "held_out" or name.startswith("depth_use")]
        known |= {f"{name}@{line['step']}": line[name] for line in lines for name in curves if name in line}
    ratio = statistics.median(line["gradient_ratio"] for line in lines if "gradient_ratio" in line)
    first = numbers["frechet"]
    record = {"name": first.name, "floor_value": first.floor, "n_reference": first.n_reference, **first.protocol}
    del record["neighbours"]  # of other numbers of the panel
    return {"values": values | probe, "described": {"gradient_ratio": ratio, **known, **described}, "record": record}


@lru_cache(maxsize=1)
def _panel(
    data: str, data_dir: str | None, image_size: int, extractor: str, autoencoder: str
) -> tuple[Panel, Decode | None]:
    """The real images with their features, and the decoder of latents; made once in each process."""
    decode = decoder_of({"data": {"autoencoder": json.loads(autoencoder)}}, device=this_process().device)
    real, held_out = load_reference(TrainConfig(data=data, data_dir=data_dir, image_size=image_size), decode)
    return Panel(make_extractor(extractor, real, held_out), real, held_out, metrics=("FD",)), decode


def _pooled_rank(model: Any, config: TrainConfig) -> float:
    """RankMe of the mean tokens of clean held-out images after the block that the published settings tap. It compares
    arms, as the rank in the training log cannot: that one is of the rows that the arm's loss gets.
    """
    images = draw_images(load_reference(config)[1], TESTED).images
    (features,) = extract(encoder(model), images, LEVELS[:1], pool="mean")  # (1, blocks, N, D)
    tapped = block_at(model, PRESETS["paper"]["depth"])
    return float(rankme(spectrum(features[0, int(tapped.rpartition(".")[2])])))


def _probe_accuracy(model: Any, config: TrainConfig, pool: str) -> float:
    """Test accuracy of the ridge probe; validation accuracy chooses its block and noise level. Null class."""
    real, held_out = load_reference(config)
    known = draw_images(real, PROBED + VALIDATED)
    cut = min(PROBED, len(known) * PROBED // (PROBED + VALIDATED))
    index = torch.arange(len(known))
    parts = [known.subset(index[:cut]), known.subset(index[cut:]), draw_images(held_out, TESTED)]
    cells = candidates(encoder(model), parts, pool=pool, draws=DRAWS, path=OBJECTIVES[config.objective][0]().path)
    return max(choose_and_test("ridge", cells)[0].accuracy, 0.5 / len(parts[2]))  # above 0, for the logarithm


def _collect(plan: Plan, cells: list[Cell], out: Path) -> list[Run]:
    """The results of all cells, in their order. Raises DataError: one is missing, and the plan fixes their number."""
    results = [_result(plan, cell, out) for cell in cells]
    if missing := [cell.name for cell, result in zip(cells, results, strict=True) if not result]:
        raise DataError(
            f"{len(missing)} of {len(cells)} runs of {plan.name} are not done ({missing[0]}, ...), and its number of "
            f"seeds is fixed: go on with dispersive-kit study run {plan.called}"
        )
    return results


def _choose(plan: Plan, runs: list[Run]) -> dict[str, dict[str, dict[str, Any]]]:
    """For each condition and arm, the trial with the lowest mean log of the Frechet distance over the tuning seeds; a
    crashed run counts as ten times the worst one of its arm. Without tuning: nothing is chosen.
    """
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    for condition, (arm, trials) in product(plan.conditions, plan.tuning.trials.items()):
        names = [f"{arm}.{number}" for number in range(len(trials))]
        own = [run for run in runs if run["condition"] == condition and run["arm"] in names]
        logs = [math.log(run["values"]["frechet"]) for run in own if run["status"] == "ok"]
        worst, total = max(logs, default=0.0) + CRASH, dict.fromkeys(names, 0.0)
        for run in own:
            total[run["arm"]] += math.log(run["values"]["frechet"]) if run["status"] == "ok" else worst
        chosen.setdefault(condition, {})[arm] = trials[names.index(min(names, key=total.__getitem__))]
    return chosen


def conclude(plan: Plan, out: Path) -> dict[str, Any]:
    """Write OUT/results.json, of all runs of a plan, and return its content. Raises DataError: runs are missing, or
    were measured against different real images or by different extractors.
    """
    tuning = _collect(plan, plan.tuning_cells(), out)
    chosen = _choose(plan, tuning)
    runs = _collect(plan, plan.cells(chosen), out)
    states = Counter(json.dumps(run["environment"]) for run in tuning + runs)
    results = {
        "plan": plan.name,
        "plan_sha256": plan.sha256,
        **plan.model_dump(include={"title", "question", "reference"}),
        "cpu_hours": {"planned": plan.cpu_hours, "used": round(sum(r["cpu_seconds"] for r in tuning + runs) / 3600, 2)},
        "verdicts": verdicts(plan, runs),
        "summary": summary(plan, runs),
        "chosen": chosen,
        "record": _shared_record(runs),
        "environments": [{**json.loads(state), "runs": n} for state, n in states.items()],
        "runs": [_kept(plan, run) for run in runs],
        "tuning": [_kept(plan, run) for run in tuning],
    }
    write_json(out / "results.json", results)
    return results


def _shared_record(runs: list[Run]) -> dict[str, Any]:
    """The part of the records that is equal in all runs. Raises DataError: what must be equal is not."""
    records = [(run["condition"], run["record"]) for run in runs if run["status"] == "ok"]
    for name in ("reference", "extractor", "data_sha256"):  # a contrast compares runs of one condition
        seen = {(condition, json.dumps(record[name], sort_keys=True)) for condition, record in records}
        if len(seen) > len({place for place, _ in seen}):
            raise DataError(f"runs of one study were measured with different {name}: they cannot be compared")
    shared = records[0][1] if records else {}
    return {name: value for name, value in shared.items() if all(r.get(name) == value for _, r in records)}


def _kept(plan: Plan, run: Run) -> Run:
    """A run with its id: hash of the plan, arm, condition, seed."""
    name = f"{plan.sha256[:8]}/{run['arm']}/{run['condition']}/seed={run['seed']}"
    return {"id": name, **{key: run[key] for key in KEPT}}
