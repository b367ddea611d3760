"""Notebooks run headlessly: one, or the stages of a pipeline (a YAML file), each once or over a grid of parameters.

A run's folder holds notebook.ipynb and .html as executed, result.json, log.txt, environment.json, and stage.json with
parameters, hash of all inputs, and how it ended. What is unchanged since it ended well is not run again; what was
killed goes on: its folder is left as it is, so that a training in it resumes from its checkpoint.
"""

import ast
import functools
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
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, Field, PositiveInt, TypeAdapter, ValidationError

from dispersive_kit.data.files import lock, read_json, write_json
from dispersive_kit.errors import ConfigError, DataError, KitError, form_error
from dispersive_kit.study.machine import describe_environment, in_pool, on_cluster, package_hash
from dispersive_kit.study.notebook import MODE_VARIABLE, PACKAGE, Mode, Name, find_notebook, read_result, runs_folder
from dispersive_kit.study.report import Ended, as_table, write_notebook_page, write_report

_SHIPPED = {file.stem: file for file in sorted((PACKAGE / "study" / "pipelines").glob("*.yaml"))}
_CELL_TIMEOUT_S = 3600  # of a notebook in smoke or class mode; a training in full mode takes what it takes
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Stage(BaseModel, extra="forbid", frozen=True):
    """A notebook, by the start of its name ("06") or by path; its parameters; those to be taken over a grid."""

    notebook: str
    name: Name | Literal[""] = ""
    parameters: dict[str, Any] = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}


class Pipeline(BaseModel, extra="forbid", frozen=True):
    """Stages in order, read from the YAML `file`.

    executor: a pool of processes here, Slurm jobs, or a trial of such jobs here (local). workers: runs of a stage at
    once; None: one for each GPU, or one, in a pool, and all on a cluster. cluster: what to ask it for.
    """

    title: Annotated[str, Field(min_length=1)]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    mode: Mode = "class"
    executor: Literal["pool", "slurm", "local"] = "pool"
    workers: PositiveInt | None = None
    cluster: dict[str, Any] = {}
    file: Path = Path()


class _Task(NamedTuple):
    """One run: its name is its folder below that of the pipeline."""

    name: str
    notebook: Path
    parameters: dict[str, Any]

    def key(self) -> str:
        """sha256 of what the run depends on: the notebook, its parameters, a forced mode and the package."""
        inputs = [self.parameters, os.environ.get(MODE_VARIABLE), package_hash()]
        return hashlib.sha256(self.notebook.read_bytes() + json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def run(
    name: str, out: Path | None = None, *, parameters: Sequence[str] = (), resume: bool = False, **changes: Any
) -> None:
    """Run a notebook, a shipped pipeline or a pipeline's YAML file, and write the report.

    parameters: of a notebook, as typed: NAME=VALUE. changes: of the fields of `Pipeline`; None is no change.

    Raises:
        ConfigError: something is unknown or of the wrong form; nothing was run. KitError: `out` holds something
            already and `resume` is off; or a run failed.
    """
    changes = {field: value for field, value in changes.items() if value is not None}
    if name in _SHIPPED or Path(name).suffix in (".yaml", ".yml"):
        if parameters:
            raise ConfigError("parameters go to a notebook; a pipeline has its own")
        pipeline = _load_pipeline(name, **changes)
        place = pipeline.file.stem
    else:
        if changes.keys() - {"mode"}:
            raise ConfigError("a notebook runs here, alone: --executor and --workers are for pipelines")
        notebook = find_notebook(name)
        if wrong := next((text for text in parameters if "=" not in text), ""):
            raise ConfigError(f"{wrong!r} is not NAME=VALUE")
        typed = _check_parameters(notebook, dict(text.split("=", 1) for text in parameters), typed=True)
        place = notebook.stem
        pipeline = Pipeline(title=place, stages=(Stage(notebook=name, parameters=typed),), **changes)
    folder, results = out or runs_folder() / place, []
    total = sum(map(len, _plan(pipeline)))
    for ended in run_pipeline(pipeline, folder, resume=resume):
        results.append(ended)
        print(f"[{len(results)}/{total}] {ended.name}: {ended.status} ({ended.seconds:.0f} s)", flush=True)
    subtitle = f"dispersive-kit run {name}, {pipeline.mode} mode: {len(results)} of {total} runs"
    page, numbers = write_report(results, folder, title=pipeline.title, subtitle=subtitle)
    print(f"\n{as_table(numbers)}\n\nreport: {page}")
    if failed := [ended for ended in results if ended.status == "failed"]:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise KitError(f"{failed[0].name} failed at {failed[0].error}; see {failed[0].folder}/log.txt{more}")


def _load_pipeline(name: str, **changes: Any) -> Pipeline:
    """A shipped pipeline by name, or one by the path of its YAML file; with fields changed."""
    file = _SHIPPED.get(name, Path(name))
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return Pipeline.model_validate({**content, **changes, "file": file} if isinstance(content, dict) else content)
    except OSError as error:
        raise ConfigError(f"no pipeline {name!r} ({error.strerror}); shipped are: {', '.join(_SHIPPED)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML of plain values: {error}") from error
    except ValidationError as error:
        raise form_error(error, str(file)) from error


def _plan(pipeline: Pipeline) -> list[list[_Task]]:
    """The runs of each stage, all of them checked; no name is used twice."""
    planned: dict[str, list[_Task]] = {}
    for stage in pipeline.stages:
        notebook = find_notebook(stage.notebook, pipeline.file.parent)
        name = stage.name or notebook.stem
        if name in planned:
            raise ConfigError(f"two stages are called {name!r}: give each a name of its own")
        shared = {"mode": pipeline.mode, **stage.parameters}
        planned[name] = [
            _Task(f"{name}/{cell}" if cell else name, notebook, _check_parameters(notebook, shared | point))
            for cell, point in _expand(stage.grid)
        ]
    return list(planned.values())


def _expand(grid: Mapping[str, Sequence[Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The points of a grid, each with a name like "seed=0,tau=0.5", safe as a folder; one nameless without a grid."""
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    names = [re.sub(r"[^\w.=,+-]", "-", ",".join(f"{k}={v}" for k, v in p.items()), flags=re.ASCII) for p in points]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two points of the grid would share the folder {sorted(twice)[0]!r}")
    return list(zip(names, points, strict=True))


def _check_parameters(notebook: Path, given: Mapping[str, Any], *, typed: bool = False) -> dict[str, Any]:
    """Parameters held against those that a notebook declares, before a kernel starts: papermill would only warn.

    typed: as text on a command line; read as JSON (3, 0.5, true, [1, 2]) unless the notebook wants a str.
    """
    import papermill

    declared = {name: one["default"] for name, one in papermill.inspect_notebook(str(notebook)).items()}
    declared.pop("out", None)
    checked = {}
    for name, value in given.items():
        if name == "out":
            raise ConfigError(f"{notebook.stem}: 'out' is set by the run itself; choose its folder with --out")
        if name not in declared:
            raise ConfigError(f"{notebook.stem} has no parameter {name!r}; it has: {', '.join(declared)}")
        try:
            default = ast.literal_eval(declared[name])
        except (ValueError, SyntaxError):  # computed
            default = None
        kind: Any = Any if default is None else type(default)  # None says nothing
        form = TypeAdapter(kind)
        read = form.validate_json if typed and kind is not str else form.validate_python
        try:
            checked[name] = read(value, strict=True)
        except ValidationError:
            said = f"{name} is {kind.__name__}, got {value!r} ({type(value).__name__})"
            raise ConfigError(f"{notebook.stem}: {said}") from None
    return checked


def run_pipeline(pipeline: Pipeline, out: Path, *, resume: bool = False) -> Iterator[Ended]:
    """Run the stages in order, yielding each run as it ends; a failed run ends the pipeline after its stage.

    Raises:
        KitError: `out` holds something already and `resume` is off. ConfigError: a notebook or parameter is unknown, a
            value has the wrong type, a name is used twice; or the workers or the request to the cluster cannot be.
    """
    planned = _plan(pipeline)
    if out.exists() and any(out.iterdir()) and not resume:
        raise KitError(f"{out} is not empty: go on with --resume, or name another folder with --out")
    failed = False
    for tasks in planned:
        if failed:
            return
        for ended in _run_tasks(pipeline, tasks, out):
            failed = failed or ended.status == "failed"
            yield ended


def _run_tasks(pipeline: Pipeline, tasks: Sequence[_Task], out: Path) -> Iterator[Ended]:
    call = functools.partial(_run_task, out=out.resolve())
    if pipeline.executor != "pool":
        done = [task for task in tasks if _ended(task, out / task.name, "ok")]
        yield from (Ended(task.name, "skipped", 0.0, out / task.name) for task in done)
        waiting = [task for task in tasks if task not in done]
        for task, last_words in on_cluster(call, waiting, pipeline.workers, out, pipeline.executor, pipeline.cluster):
            ended = _ended(task, out / task.name, "ok", "failed")
            yield ended or Ended(task.name, "failed", 0.0, out / task.name, last_words)
    elif len(tasks) == 1:
        yield call(tasks[0])
    else:
        for task, future in in_pool(call, tasks, pipeline.workers):
            try:
                yield future.result()
            except BrokenExecutor:
                error = "a worker was killed (by the system, for memory?); --resume runs again what is not done"
                yield Ended(task.name, "failed", 0.0, out / task.name, error)


def run_notebook(name: str, folder: Path, parameters: Mapping[str, Any] | None = None) -> Ended:
    """Execute one notebook into `folder`, its `out`, unless it has ended well there from the same inputs before.

    Raises:
        ConfigError: no such notebook or parameter, or a value of the wrong type. KitError: the folder holds something
            else than a run of a notebook.
    """
    notebook = find_notebook(name)
    return _run_task(_Task(folder.name, notebook, _check_parameters(notebook, parameters or {})), folder.parent)


def _run_task(task: _Task, out: Path) -> Ended:
    """Files of a run from other inputs are moved to FOLDER.earlier-1. Where another process runs, this one waits."""
    folder = out / task.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder.with_name(f".{folder.name}.lock")):  # beside the folder, since that may be moved
        if _ended(task, folder, "ok"):
            return Ended(task.name, "skipped", 0.0, folder)
        stage = _read_stage(folder)
        if not stage and folder.exists() and any(folder.iterdir()):
            raise KitError(f"{folder} holds no run of a notebook, and is not empty: name another folder with --out")
        if stage.get("key", task.key()) != task.key():
            numbered = (folder.with_name(f"{folder.name}.earlier-{n}") for n in itertools.count(1))
            folder.rename(next(earlier for earlier in numbered if not earlier.exists()))
        return _run(task, folder)


def _run(task: _Task, folder: Path) -> Ended:
    folder.mkdir(exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # of an attempt that did not end well
    stage = {"name": task.name, "notebook": task.notebook.stem, "key": task.key(), "parameters": task.parameters}
    stage |= {"status": "running", "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_json(folder / "stage.json", stage)
    write_json(folder / "environment.json", describe_environment())
    started, log = time.perf_counter(), folder / "log.txt"
    error, traceback = _execute(task, folder, log)
    error = error or next(_hidden_faults(folder / "notebook.ipynb"), "")
    try:
        read_result(folder)
    except DataError as fault:
        error = error or str(fault)
    lines = _ANSI.sub("", log.read_bytes().decode()).replace("\r\n", "\n").split("\n")
    said = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)  # the last state of each progress bar
    log.write_text(f"{said}\n{traceback or error}\n", encoding="utf-8")
    write_notebook_page(folder / "notebook.ipynb")
    ended = Ended(task.name, "failed" if error else "ok", round(time.perf_counter() - started, 1), folder, error)
    told = {"status": ended.status, "seconds": ended.seconds, "error": error, "traceback": traceback}
    write_json(folder / "stage.json", stage | told)
    return ended


def _execute(task: _Task, folder: Path, log: Path) -> tuple[str, str]:
    """Error in one line and traceback; both empty at its end."""
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
    """Errors that stopped no cell, in a thread or a widget: on a cell's stderr, or in the state of an Output widget."""
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


def _read_stage(folder: Path) -> dict[str, Any]:
    return read_json(folder / "stage.json", default={})


def _ended(task: _Task, folder: Path, *how: str) -> Ended | None:
    """The run in `folder`, if it was of these inputs and has ended so."""
    stage = _read_stage(folder)
    if stage.get("key") != task.key() or stage["status"] not in how:
        return None
    return Ended(task.name, stage["status"], stage["seconds"], folder, stage["error"])
