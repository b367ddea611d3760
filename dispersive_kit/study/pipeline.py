"""Pipelines: notebooks in order, each once or over a grid of parameters, as YAML.

title: Six seeds of one experiment
stages:
  - notebook: "06"
    name: seeds
    grid: {seed: [0, 1, 2, 3, 4, 5]}

runs/mine/seeds/seed=0/{notebook.ipynb, result.json, stage.json, ...}
runs/mine/seeds/aggregate.json
runs/mine/report.html
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dispersive_kit.errors import ConfigError, KitError
from dispersive_kit.study.execute import StageResult
from dispersive_kit.study.lookup import PACKAGE, check_parameters, find_notebook, folder_within, safe_name
from dispersive_kit.study.schema import check_form
from dispersive_kit.study.sweep import Executor, Task, expand, run_tasks, write_aggregate

SHIPPED = PACKAGE / "study" / "pipelines"


@dataclass(frozen=True)
class Stage:
    """A notebook, by the start of its name ("06") or by path; its parameters; those to be taken over a grid."""

    notebook: str
    parameters: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    grid: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pipeline:
    """Stages in order. `cluster` holds what submitit asks of a cluster; `folder` is where its file lies."""

    name: str
    title: str
    stages: tuple[Stage, ...]
    mode: str = "class"
    cluster: dict[str, Any] = field(default_factory=dict)
    folder: Path = SHIPPED


def shipped_pipelines() -> list[str]:
    """Names of the pipelines that come with the kit."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def load_pipeline(name: str) -> Pipeline:
    """A shipped pipeline by name, or one by the path of its YAML file.

    Raises:
        ConfigError: no such pipeline; not YAML of plain values; not of a pipeline's form.
    """
    file = SHIPPED / f"{name}.yaml" if name in shipped_pipelines() else Path(name)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(shipped_pipelines())
        raise ConfigError(f"no pipeline {name!r} ({error.strerror}); shipped are: {known}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML of plain values: {error}") from error
    check_form(content, "pipeline", str(file))
    stages = tuple(Stage(**stage) for stage in content.pop("stages"))
    return Pipeline(safe_name(file.stem), stages=stages, folder=file.parent, **content)


def plan(stages: Sequence[Stage], out: Path, *, mode: str = "", beside: Path | None = None) -> list[list[Task]]:
    """The runs of each stage, all of them checked.

    Raises:
        ConfigError: a notebook or parameter is unknown, a value has the wrong type, a name would leave `out` or is
            used twice.
    """
    runs, names = [], set()
    for stage in stages:
        notebook = find_notebook(stage.notebook, beside)
        name = safe_name(stage.name or notebook.stem, "stage name")
        if name in names:
            raise ConfigError(f"two stages are called {name!r}: give each a name of its own")
        names.add(name)
        given = {"mode": mode, **stage.parameters} if mode else stage.parameters
        cells = expand(stage.grid)
        tasks = [Task(f"{name}/{cell}" if cell else name, notebook, {**given, **point}) for cell, point in cells]
        for task in tasks:
            check_parameters(notebook, task.parameters)
            folder_within(out, task.name)
        runs.append(tasks)
    return runs


def run_pipeline(
    stages: Sequence[Stage],
    out: Path,
    *,
    mode: str = "",
    resume: bool = False,
    beside: Path | None = None,
    executor: Executor | None = None,
) -> Iterator[StageResult]:
    """Run the stages in order, yielding each result as it ends; a failed stage ends the pipeline.

    Runs of one stage's grid go on beside a failed one, and what ended well is brought together in aggregate.json.

    Raises:
        KitError: `out` holds something already and `resume` is off. ConfigError: see `plan`; before anything runs.
    """
    planned = plan(stages, out, mode=mode, beside=beside)
    require_new(out, resume=resume)
    for stage, tasks in zip(stages, planned, strict=True):
        results = []
        for result in run_tasks(tasks, out, executor or Executor()):
            results.append(result)
            yield result
        if stage.grid:
            write_aggregate(tasks, stage.grid, out)
        if any(result.status == "failed" for result in results):
            return


def require_new(out: Path, *, resume: bool) -> None:
    """Never write into a folder that holds something, unless asked.

    Raises:
        KitError: it does, and `resume` is off.
    """
    if out.exists() and any(out.iterdir()) and not resume:
        raise KitError(f"{out} is not empty: go on with --resume, or name another folder with --out")
