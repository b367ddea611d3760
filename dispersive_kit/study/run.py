"""Notebooks run headlessly: one, or the stages of a pipeline (a YAML file), each once or over a grid of parameters.

A run's folder holds notebook.ipynb and .html as executed, result.json, log.txt, and stage.json (see `NotebookTask`).
A run that ended well and is unchanged is not run again. A killed run continues in its folder, so that a training in it
resumes from its checkpoint.
"""

import builtins
import hashlib
import itertools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveInt, TypeAdapter, ValidationError

from dispersive_kit.data.files import lock, write_json
from dispersive_kit.errors import ConfigError, DataError, KitError, printable
from dispersive_kit.study import notebook as nb
from dispersive_kit.study.machine import describe_environment, in_pool, package_hash, require_home
from dispersive_kit.study.report import NotebookTask, read_task, write_notebook_page, write_report

_SHIPPED = {file.stem: file for file in sorted((nb.PACKAGE / "study" / "pipelines").glob("*.yaml"))}
_CELL_TIMEOUT_S = 3600  # of a notebook in smoke or class mode; full mode has no limit
# In a notebook's JSON: errors that stopped no cell, of an Output widget, or of a thread, on a cell's stderr.
_HIDDEN = re.compile(r'"ename": "(\w+)"|"Traceback \(most recent call last\):.*?^\s*"(\S.*?)(?:\\n)?",?$', re.S | re.M)
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class _Stage(BaseModel, extra="forbid", frozen=True):
    """A notebook, by the start of its name ("06") or by path; its parameters; those to be taken over a grid."""

    notebook: str
    name: nb.Name | Literal[""] = ""
    parameters: dict[str, Any] = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}


class _Pipeline(BaseModel, extra="forbid", frozen=True):
    """Stages in order, read from the YAML `file`. workers: runs of a stage at once; None: one for each GPU, or one."""

    title: Annotated[str, Field(min_length=1)]
    stages: Annotated[tuple[_Stage, ...], Field(min_length=1)]
    mode: nb.Mode = "class"
    workers: PositiveInt | None = None
    file: Path = Path()
    executor: Literal["pool"] = "pool"  # from earlier versions, as `cluster` is; neither is used
    cluster: Any = None


def run(
    name: str, out: Path | None = None, *, parameters: Sequence[str] = (), resume: bool = False, **changes: Any
) -> None:
    """Run a notebook, a shipped pipeline or a pipeline's YAML file, and write the report.

    parameters: of a notebook, as typed: NAME=VALUE. changes: new values of pipeline fields; None: no change.
    Raises ConfigError: a name is unknown or a value has a wrong form; nothing was run. KitError: `out` is not empty
        and `resume` is off; or a run failed.
    """
    pipeline = _open(name, parameters, {field: value for field, value in changes.items() if value is not None})
    folder, ended = out or nb.runs_folder() / pipeline.file.stem, []
    total = sum(map(len, _plan(pipeline, folder)))
    require_home()
    print(printable(f"{total} runs of notebooks, {pipeline.mode} mode, into {folder}"), flush=True)
    for task in _run_pipeline(pipeline, folder, resume=resume):
        ended.append(task)
        print(printable(f"[{len(ended)}/{total}] {task.name}: {task.status} ({task.seconds:.0f} s)"), flush=True)
    subtitle = f"dispersive-kit run {name}, {pipeline.mode} mode: {len(ended)} of {total} runs"
    page, numbers = write_report(ended, folder, title=pipeline.title, subtitle=subtitle)
    print(f"\n{numbers}\n\nreport: {page}")
    if failed := [task for task in ended if task.status == "failed"]:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise KitError(f"{failed[0].name} failed at {failed[0].error}; see {failed[0].folder}/log.txt{more}")


def _open(name: str, parameters: Sequence[str], changes: dict[str, Any]) -> _Pipeline:
    if name in _SHIPPED or Path(name).suffix in (".yaml", ".yml"):
        if parameters:
            raise ConfigError("-p is for a single notebook; a pipeline file has its own parameters")
        file, missing = _SHIPPED.get(name, Path(name)), f"no pipeline {name!r}; shipped are: {', '.join(_SHIPPED)}"
        return nb.read_form(file, _Pipeline, missing, file=file, **changes)
    if "workers" in changes:
        raise ConfigError("a notebook runs alone: --workers is for pipelines")
    notebook = nb.find_notebook(name).absolute()
    if wrong := next((text for text in parameters if "=" not in text), ""):
        raise ConfigError(f"-p {wrong!r} is not NAME=VALUE: write, for example, -p seed=3")
    typed = _check_parameters(notebook, dict(text.split("=", 1) for text in parameters), typed=True)
    stage = _Stage(notebook=str(notebook), parameters=typed)
    return _Pipeline(title=notebook.stem, stages=(stage,), file=notebook, **changes)


def _plan(pipeline: _Pipeline, out: Path = Path()) -> list[list[NotebookTask]]:
    """The runs of each stage, all of them checked; no name is used twice."""
    planned: dict[str, list[NotebookTask]] = {}
    for stage in pipeline.stages:
        notebook = nb.find_notebook(stage.notebook, pipeline.file.parent)
        name = stage.name or notebook.stem
        if name in planned:
            raise ConfigError(f"two stages are called {name!r}: give each a name of its own")
        tasks = planned.setdefault(name, [])
        for values in itertools.product(*stage.grid.values()):
            point = dict(zip(stage.grid, values, strict=True))
            checked = _check_parameters(notebook, {"mode": pipeline.mode, **stage.parameters, **point})
            cell = ",".join(f"{key}={value}" for key, value in point.items())  # such as seed=0,tau=0.5
            cell = re.sub(r"[^\w.=,+-]", "-", cell, flags=re.ASCII)  # safe as a folder's name
            run = f"{name}/{cell}" if cell else name
            if run in (task.name for task in tasks):
                raise ConfigError(f"two points of the grid would share the folder {cell!r}")
            tasks.append(NotebookTask(name=run, notebook=notebook, parameters=checked, folder=out.resolve() / run))
    return list(planned.values())


def _check_parameters(notebook: Path, given: Mapping[str, Any], *, typed: bool = False) -> dict[str, Any]:
    """Check parameters against those that a notebook declares, before a kernel starts: papermill would only warn.

    typed: as text on a command line; read as JSON (3, 0.5, true, [1, 2]) unless the notebook wants a str.
    """
    import papermill

    nb.read_notebook(notebook)  # before papermill, which raises its own errors
    declared = {name: one["inferred_type_name"] for name, one in papermill.inspect_notebook(str(notebook)).items()}
    declared.pop("out", None)
    checked = {}
    for name, value in given.items():
        if name not in declared:
            known = ", ".join(declared)
            raise ConfigError(f"{notebook.stem} has no parameter {name!r}; it has: {known}. --out names its folder")
        kind = getattr(builtins, declared[name], object)
        form = TypeAdapter[Any](kind)
        read = form.validate_json if typed and kind is not str else form.validate_python
        try:
            checked[name] = read(value, strict=True)
        except ValidationError:
            said = f"{name} is {kind.__name__}, got {value!r} ({type(value).__name__})"
            raise ConfigError(f"{notebook.stem}: {said}") from None
    return checked


def _run_pipeline(pipeline: _Pipeline, out: Path, *, resume: bool = False) -> Iterator[NotebookTask]:
    """Run the stages in order, yielding each run as it ends; a failed run ends the pipeline after its stage."""
    planned = _plan(pipeline, out)
    if out.exists() and any(out.iterdir()) and not resume:
        raise KitError(f"{out} is not empty: go on with --resume, or name another folder with --out")
    for tasks in planned:
        ended = []
        for task in _run_tasks(tasks, pipeline.workers):
            ended.append(task.status)
            yield task
        if "failed" in ended:
            return


class _ElsewhereError(KitError):
    """Another process is executing this run."""


def _run_tasks(tasks: list[NotebookTask], workers: int | None) -> Iterator[NotebookTask]:
    """Execute each task once. Those of another process come last, so that jobs of a cluster share a sweep."""
    last = tasks if len(tasks) == 1 else []
    for task, future in in_pool(partial(_run_task, busy="elsewhere"), tasks, workers) if len(tasks) > 1 else ():
        try:
            yield future.result()
        except _ElsewhereError:
            last.append(task)
        except BrokenExecutor:
            error = "a worker was killed (by the system, for memory?); --resume runs what is not done"
            yield task.model_copy(update={"status": "failed", "error": error})
    yield from map(_run_task, last)


def _key(task: NotebookTask) -> str:
    """sha256 of what a run depends on: the notebook, its parameters, a forced mode and the package."""
    inputs = [task.parameters, os.environ.get(nb.MODE_VARIABLE), package_hash()]
    return hashlib.sha256(task.notebook.read_bytes() + json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _run_task(task: NotebookTask, busy: str = "") -> NotebookTask:
    """Execute one notebook into its folder, unless that is done.

    Files of a run from other inputs are moved to FOLDER.earlier-1. If another process is executing it, this one
    waits, or, if `busy` is given, raises _ElsewhereError with this text.
    """
    folder = task.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.lock")  # not in the folder, since that may be moved
    with lock(beside, busy, _ElsewhereError):
        earlier, key = read_task(folder), _key(task)
        if earlier and (earlier.status, earlier.key) == ("ok", key):
            return earlier.model_copy(update={"status": "skipped"})
        if not earlier and folder.exists() and any(folder.iterdir()):
            raise KitError(f"{folder} holds no run of a notebook, and is not empty: name another folder with --out")
        if earlier and earlier.key != key:
            numbered = (folder.with_name(f"{folder.name}.earlier-{n}") for n in itertools.count(1))
            folder.rename(next(free for free in numbered if not free.exists()))
        folder.mkdir(exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)  # of an attempt that did not end well
        started = {"status": "running", "key": key, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        task = task.model_copy(update={**started, "environment": describe_environment()})
        write_json(folder / "stage.json", task.model_dump(mode="json"))
        began = time.perf_counter()
        task.error, task.traceback = _execute(task)
        task.status, task.seconds = "failed" if task.error else "ok", round(time.perf_counter() - began, 1)
        write_json(folder / "stage.json", task.model_dump(mode="json"))
        return task


def _execute(task: NotebookTask) -> tuple[str, str]:
    """Execute a notebook; returns the error in one line and the traceback, both empty if it ended well."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    from dispersive_kit.study.lab import Kernel

    logging.getLogger("papermill").setLevel(logging.ERROR)
    log, executed, error, traceback = task.folder / "log.txt", task.folder / "notebook.ipynb", "", ""
    with log.open("w", encoding="utf-8") as stream:
        try:
            papermill.execute_notebook(
                str(task.notebook),
                str(executed),
                parameters={**task.parameters, "out": str(task.folder)},
                kernel_name="python3",
                kernel_manager_class=Kernel,
                progress_bar=sys.stderr.isatty(),
                stdout_file=stream,
                stderr_file=stream,
                cwd=str(task.folder),
                execution_timeout=None if task.parameters.get("mode") == "full" else _CELL_TIMEOUT_S,
                extra_arguments=["--log-level=CRITICAL"],  # the kernel logs its normal end as an error
            )
            if hidden := _HIDDEN.search(executed.read_text(encoding="utf-8")):
                error = f"an error outside the cells (widget, thread): {hidden[1] or hidden[2]}; see notebook.html"
            nb.read_result(task.folder)
        except papermill.PapermillExecutionError as failed:
            error = f"cell {failed.exec_count}: {failed.ename}: {failed.evalue}"
            traceback = _ANSI.sub("", "\n".join(failed.traceback))
        except (CellTimeoutError, DeadKernelError, RuntimeError) as failed:  # RuntimeError: of the start
            error = f"{type(failed).__name__}: {failed}"
        except DataError as failed:
            error = error or str(failed)
    lines = _ANSI.sub("", log.read_bytes().decode()).replace("\r\n", "\n").split("\n")
    said = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)  # the last state of each progress bar
    log.write_text(f"{said}\n{traceback or error}\n", encoding="utf-8")
    write_notebook_page(executed, task.notebook)
    return error, traceback
