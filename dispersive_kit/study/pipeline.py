"""Pipelines: notebooks in order, each once or over a grid of parameters, as YAML.

title: Six seeds of one experiment
stages:
  - notebook: "06"
    name: seeds
    grid: {seed: [0, 1, 2, 3, 4, 5]}
"""

import ast
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dispersive_kit.errors import ConfigError, form_error
from dispersive_kit.study.machine import package_hash
from dispersive_kit.study.notebook import MODE_VARIABLE, PACKAGE, Mode, find_notebook

_Name = Annotated[str, Field(pattern=r"^([A-Za-z0-9][\w.=,+-]*)?$")]  # of a folder, which leads nowhere else
_SHIPPED = PACKAGE / "study" / "pipelines"


class Stage(BaseModel):
    """A notebook, by the start of its name ("06") or by path; its parameters; those to be taken over a grid."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    notebook: str
    name: _Name = ""
    parameters: dict[str, Any] = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}


class Pipeline(BaseModel):
    """Stages in order. `cluster` holds what submitit asks of a cluster; `file` is the YAML it was read from."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: Annotated[str, Field(min_length=1)]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    mode: Mode = "class"
    cluster: dict[str, Any] = {}
    file: Path = Path()


@dataclass(frozen=True)
class Task:
    """One run: its name is its folder below that of the pipeline."""

    name: str
    notebook: Path
    parameters: dict[str, Any]

    def key(self) -> str:
        """sha256 of what the run depends on: the notebook, its parameters, a forced mode and the package."""
        inputs = [self.parameters, os.environ.get(MODE_VARIABLE), package_hash()]
        return hashlib.sha256(self.notebook.read_bytes() + json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def shipped_pipelines() -> list[str]:
    """Names of the pipelines that come with the kit."""
    return sorted(file.stem for file in _SHIPPED.glob("*.yaml"))


def load_pipeline(name: str) -> Pipeline:
    """A shipped pipeline by name, or one by the path of its YAML file.

    Raises:
        ConfigError: no such pipeline; not YAML of plain values; not of a pipeline's form.
    """
    file = _SHIPPED / f"{name}.yaml" if name in shipped_pipelines() else Path(name)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return Pipeline.model_validate({**content, "file": file} if isinstance(content, dict) else content)
    except OSError as error:
        known = ", ".join(shipped_pipelines())
        raise ConfigError(f"no pipeline {name!r} ({error.strerror}); shipped are: {known}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML of plain values: {error}") from error
    except ValidationError as error:
        raise form_error(error, str(file)) from error


def plan(pipeline: Pipeline, *, mode: str = "") -> list[list[Task]]:
    """The runs of each stage, all of them checked.

    Raises:
        ConfigError: a notebook or parameter is unknown, a value has the wrong type, or a name is used twice.
    """
    planned: dict[str, list[Task]] = {}
    for stage in pipeline.stages:
        notebook = find_notebook(stage.notebook, pipeline.file.parent)
        name = stage.name or notebook.stem
        if name in planned:
            raise ConfigError(f"two stages are called {name!r}: give each a name of its own")
        shared = {"mode": mode, **stage.parameters} if mode else stage.parameters
        planned[name] = [
            Task(f"{name}/{cell}" if cell else name, notebook, check_parameters(notebook, shared | point))
            for cell, point in expand(stage.grid)
        ]
    return list(planned.values())


def expand(grid: Mapping[str, Sequence[Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The points of a grid, each with a name like "seed=0,tau=0.5" that can be a folder; one nameless without a grid.

    Raises:
        ConfigError: two points would have the same name.
    """
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    names = [re.sub(r"[^\w.=,+-]", "-", ",".join(f"{k}={v}" for k, v in p.items()), flags=re.ASCII) for p in points]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two points of the grid would share the folder {sorted(twice)[0]!r}")
    return list(zip(names, points, strict=True))


def check_parameters(notebook: Path, given: Mapping[str, Any], *, typed: bool = False) -> dict[str, Any]:
    """Parameters held against those that a notebook declares, before a kernel starts: papermill would only warn.

    typed: as text on a command line; read as JSON (3, 0.5, true, [1, 2]) unless the notebook wants a str.

    Raises:
        ConfigError: one that the notebook does not have, or a value of another type than its default.
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
        kind = type(ast.literal_eval(declared[name]))
        adapter = TypeAdapter(kind)
        try:
            as_json = typed and kind is not str
            read = adapter.validate_json if as_json else adapter.validate_python
            checked[name] = read(value, strict=True)
        except ValidationError:
            said = f"{name} is {kind.__name__}, got {value!r} ({type(value).__name__})"
            raise ConfigError(f"{notebook.stem}: {said}") from None
    return checked
