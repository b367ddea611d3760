"""Notebooks run headlessly: one, or the stages of a pipeline, each once or over a grid of parameters.

title: Six seeds of one experiment             # a pipeline's YAML
stages:
  - notebook: "06"
    name: seeds
    grid: {seed: [0, 1, 2, 3, 4, 5]}

runs/mine/report.html
runs/mine/seeds/aggregate.json                 # over the seeds of each point of the grid
runs/mine/seeds/seed=0/notebook.ipynb, .html   # as executed; a failed one is kept too
runs/mine/seeds/seed=0/stage.json              # parameters, hash of all inputs, and how it ended
runs/mine/seeds/seed=0/result.json             # what it measured
runs/mine/seeds/seed=0/environment.json, log.txt

A run whose inputs (notebook, parameters, package) are unchanged since it ended well is not run again. One that was
killed goes on: its folder is left as it is, so that a training in it resumes from its checkpoint.
"""

import functools
import itertools
import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any, Literal

from dispersive_kit.data.files import lock, read_json, write_json
from dispersive_kit.errors import ConfigError, DataError, KitError
from dispersive_kit.study.machine import describe_environment, in_pool, on_cluster, visible_gpus
from dispersive_kit.study.notebook import find_notebook, read_result, runs_folder
from dispersive_kit.study.pipeline import (
    Pipeline,
    Stage,
    Task,
    check_parameters,
    load_pipeline,
    plan,
    shipped_pipelines,
)
from dispersive_kit.study.report import Ended, as_table, measured, write_notebook_page, write_report

Executor = Literal["pool", "slurm", "local"]  # local: a trial of Slurm jobs here
_CELL_TIMEOUT_S = 3600  # of a notebook in smoke or class mode; a training in full mode takes what it takes
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def run(
    name: str,
    out: Path | None = None,
    *,
    mode: str | None = None,
    parameters: Sequence[str] = (),
    resume: bool = False,
    executor: Executor = "pool",
    workers: int | None = None,
) -> None:
    """Run a notebook, a shipped pipeline or a pipeline's YAML file, and write the report.

    parameters: of a notebook, as typed: NAME=VALUE. workers: see `run_pipeline`.

    Raises:
        ConfigError: something is unknown or of the wrong form; nothing was run. KitError: `out` holds something
            already and `resume` is off; or a run failed.
    """
    if name in shipped_pipelines() or Path(name).suffix in (".yaml", ".yml"):
        if parameters:
            raise ConfigError("parameters go to a notebook; a pipeline has its own")
        pipeline = load_pipeline(name)
        place, mode = pipeline.file.stem, mode or pipeline.mode
    else:
        if (executor, workers) != ("pool", None):
            raise ConfigError("a notebook runs here, alone: --executor and --workers are for pipelines")
        notebook, mode = find_notebook(name), mode or "class"
        place, typed = notebook.stem, check_parameters(notebook, dict(map(_split, parameters)), typed=True)
        pipeline = Pipeline(title=place, stages=(Stage(notebook=name, parameters=typed),))
    folder, results = out or runs_folder() / place, []
    total = sum(len(tasks) for tasks in plan(pipeline, mode=mode))
    for ended in run_pipeline(pipeline, folder, mode=mode, resume=resume, executor=executor, workers=workers):
        results.append(ended)
        print(f"[{len(results)}/{total}] {ended.name}: {ended.status} ({ended.seconds:.0f} s)", flush=True)
    subtitle = f"dispersive-kit run {name}, {mode} mode: {len(results)} of {total} runs"
    page = write_report(results, folder, title=pipeline.title, subtitle=subtitle)
    print(f"\n{as_table(measured(results, folder))}\n\nreport: {page}")
    if failed := [ended for ended in results if ended.status == "failed"]:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise KitError(f"{failed[0].name} failed at {failed[0].error}; see {failed[0].folder}/log.txt{more}")


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r} is not NAME=VALUE")
    return name, value


def runs_table() -> str:
    """All runs of notebooks in the runs folder. The folders are the registry: it is never out of date."""
    place, rows = runs_folder(), [["run", "status", "mode", "time", "started", "code", "device"]]
    for file in sorted(place.rglob("stage.json")):
        stage, machine, result = (
            read_json(file.with_name(name), default={}) for name in ("stage.json", "environment.json", "result.json")
        )
        status = stage.get("status", "killed")
        if status == "running" and not _is_held(_lock_of(file.parent)):
            status = "killed"
        mode = result.get("mode") or stage.get("parameters", {}).get("mode", "")
        started = stage.get("started", "")[:16].replace("T", " ")
        seconds = f"{stage['seconds']:.0f} s" if "seconds" in stage else ""
        name, code = file.parent.relative_to(place).as_posix(), (machine.get("commit") or "")[:9]
        rows.append([name, status, mode, seconds, started, code, machine.get("device", "")])
    return as_table(rows) if len(rows) > 1 else f"no runs in {place}"


# ---- pipelines


def run_pipeline(
    pipeline: Pipeline,
    out: Path,
    *,
    mode: str = "",
    resume: bool = False,
    executor: Executor = "pool",
    workers: int | None = None,
) -> Iterator[Ended]:
    """Run the stages in order, yielding each run as it ends; a failed run ends the pipeline after its stage.

    workers: at most so many runs at once; None: one for each GPU, or one, in a pool, and all on a cluster.

    Raises:
        KitError: `out` holds something already and `resume` is off. ConfigError: no worker, more of them than GPUs, a
            request that submitit does not understand; or see `plan`; before anything runs.
    """
    planned = plan(pipeline, mode=mode)
    if workers is not None and workers < 1:
        raise ConfigError(f"{workers} workers cannot run anything: --workers takes 1 or more")
    if out.exists() and any(out.iterdir()) and not resume:
        raise KitError(f"{out} is not empty: go on with --resume, or name another folder with --out")
    for tasks in planned:
        failed = False
        for ended in _run_tasks(tasks, out, executor, workers, pipeline.cluster):
            failed = failed or ended.status == "failed"
            yield ended
        if failed:
            return


def _run_tasks(
    tasks: Sequence[Task], out: Path, executor: Executor, workers: int | None, request: dict[str, Any]
) -> Iterator[Ended]:
    call, gpus = functools.partial(_run_task, out=out.resolve()), visible_gpus()
    if executor != "pool":
        yield from (Ended(t.name, "skipped", 0.0, out / t.name) for t in tasks if _ended_well(t, out / t.name))
        waiting = [task for task in tasks if not _ended_well(task, out / task.name)]
        where: dict[str, Any] = {"cluster": executor, "request": request}
        for task, last_words in on_cluster(call, waiting, workers or len(tasks), out / ".submitit", **where):
            yield _result_of(task, out / task.name) or Ended(task.name, "failed", 0.0, out / task.name, last_words)
    elif (at_once := min(workers or len(gpus) or 1, len(tasks))) == 1:
        yield from map(call, tasks)
    else:
        for task, future in in_pool(call, tasks, at_once, gpus):
            try:
                yield future.result()
            except BrokenExecutor:
                error = "a worker was killed (by the system, for memory?); --resume runs again what is not done"
                yield Ended(task.name, "failed", 0.0, out / task.name, error)


def _run_task(task: Task, out: Path) -> Ended:
    return run_notebook(str(task.notebook), out / task.name, task.parameters, label=task.name)


def _result_of(task: Task, folder: Path) -> Ended | None:
    stage = read_stage(folder)
    if stage.get("key") != task.key() or stage["status"] == "running":
        return None
    return Ended(task.name, stage["status"], stage["seconds"], folder, stage["error"])


# ---- one run


def run_notebook(name: str, folder: Path, parameters: Mapping[str, Any] | None = None, *, label: str = "") -> Ended:
    """Execute one notebook into `folder`, unless it has ended well there from the same inputs before.

    The folder is passed to the notebook as `out`. Files of a run from other inputs are moved to FOLDER.earlier-1.
    While another process runs in the folder, this one waits.

    Raises:
        ConfigError: no such notebook or parameter, or a value of the wrong type. KitError: the folder holds something
            else than a run of a notebook.
    """
    notebook = find_notebook(name)
    task = Task(label or notebook.stem, notebook, check_parameters(notebook, parameters or {}))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(_lock_of(folder)):
        if _ended_well(task, folder):
            return Ended(task.name, "skipped", 0.0, folder)
        stage = read_stage(folder)
        if not stage and folder.exists() and any(folder.iterdir()):
            raise KitError(f"{folder} holds no run of a notebook, and is not empty: name another folder with --out")
        if stage.get("key", task.key()) != task.key():
            numbered = (folder.with_name(f"{folder.name}.earlier-{n}") for n in itertools.count(1))
            folder.rename(next(earlier for earlier in numbered if not earlier.exists()))
        return _run(task, folder)


def _run(task: Task, folder: Path) -> Ended:
    folder.mkdir(exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # of an attempt that did not end well
    stage = {"name": task.name, "notebook": task.notebook.stem, "key": task.key(), "parameters": task.parameters}
    stage |= {"status": "running", "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_json(folder / "stage.json", stage)
    write_json(folder / "environment.json", describe_environment())
    started, log = time.perf_counter(), folder / "log.txt"
    error, traceback = _execute(task, folder, log)
    error = error or next(_hidden_faults(folder / "notebook.ipynb"), "")
    if not error:
        try:
            read_result(folder)
        except DataError as fault:
            error = str(fault)
    lines = _ANSI.sub("", log.read_bytes().decode()).replace("\r\n", "\n").split("\n")
    said = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)  # the last state of each progress bar
    log.write_text(f"{said}\n{traceback or error}\n", encoding="utf-8")
    write_notebook_page(folder / "notebook.ipynb")
    ended = Ended(task.name, "failed" if error else "ok", round(time.perf_counter() - started, 1), folder, error)
    told = {"status": ended.status, "seconds": ended.seconds, "error": error, "traceback": traceback}
    write_json(folder / "stage.json", stage | told)
    return ended


def _execute(task: Task, folder: Path, log: Path) -> tuple[str, str]:
    """Error in one line and traceback; both empty if the notebook came to its end."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    from dispersive_kit.study.lab import Kernel

    logging.getLogger("papermill").setLevel(logging.ERROR)
    with log.open("w", encoding="utf-8") as stream:
        try:
            papermill.execute_notebook(
                str(task.notebook),
                str(folder.resolve() / "notebook.ipynb"),
                parameters={**task.parameters, "out": str(folder.resolve())},
                kernel_name="python3",
                kernel_manager_class=Kernel,
                progress_bar=sys.stderr.isatty(),
                stdout_file=stream,
                stderr_file=stream,
                cwd=str(folder),
                execution_timeout=None if task.parameters.get("mode") == "full" else _CELL_TIMEOUT_S,
                extra_arguments=["--log-level=CRITICAL"],  # of the kernel: it calls its own end an error
            )
        except papermill.PapermillExecutionError as failed:
            place = f"cell {failed.exec_count}: {failed.ename}: {failed.evalue}"
            return place, _ANSI.sub("", "\n".join(failed.traceback))
        except (CellTimeoutError, DeadKernelError, RuntimeError) as failed:  # RuntimeError: of the start
            return f"{type(failed).__name__}: {failed}", ""
    return "", ""


def _hidden_faults(notebook: Path) -> Iterator[str]:
    """Errors that stopped no cell, in a thread, an observer or a widget: on the stderr of a cell, or in the saved state
    of an Output widget.
    """
    import nbformat

    document = nbformat.read(notebook, as_version=4)
    outputs = [output for cell in document.cells for output in cell.get("outputs", [])]
    widgets = document.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    outputs += [o for model in widgets.get("state", {}).values() for o in model["state"].get("outputs") or ()]
    for output in outputs:
        text = "".join(output.get("text", ""))
        if output["output_type"] == "error":
            yield f"an error was hidden from the run: {output['ename']}: {output['evalue']}"
        elif "Traceback (most recent call last)" in text:
            yield f"an error was hidden from the run: {text.strip().splitlines()[-1]}"


def read_stage(folder: Path) -> dict[str, Any]:
    return read_json(folder / "stage.json", default={})


def _ended_well(task: Task, folder: Path) -> bool:
    """Whether the run in `folder` was of these inputs, and ended well."""
    ended = _result_of(task, folder)
    return ended is not None and ended.status == "ok" and (folder / "result.json").is_file()


def _lock_of(folder: Path) -> Path:
    """Beside the folder, since that may be moved."""
    return folder.with_name(f".{folder.name}.lock")


def _is_held(file: Path) -> bool:
    try:
        with lock(file, busy="held"):
            return False
    except KitError:
        return True
