"""Notebooks run headlessly through papermill, one after another, each in a folder of its own.

    runs/demo/00_start_here/{notebook.ipynb, result.json, stage.json, ...}
    runs/demo/report.html

A stage whose notebook, parameters and package are unchanged since it ended well is not run again.
"""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dispersive_kit.errors import ConfigError, KitError
from dispersive_kit.study.gate import tracebacks

PACKAGE = Path(__file__).resolve().parents[1]
CELL_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Stage:
    """A notebook, by the start of its name ("06"), and parameters for it."""

    notebook: str
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageResult:
    """How a stage ended: "ok", "skipped" (unchanged) or "failed", and the folder that holds everything of it."""

    name: str
    status: str
    seconds: float
    folder: Path
    error: str = ""


PIPELINES: dict[str, tuple[Stage, ...]] = {
    "demo": (Stage("00"), Stage("02"), Stage("04"), Stage("06")),
}


def notebooks_folder() -> Path:
    """The notebooks of a checkout, or those inside the installed package."""
    inside = PACKAGE / "notebooks"
    return inside if inside.is_dir() else PACKAGE.parent / "notebooks"


def find_notebook(name: str) -> Path:
    """A notebook by path, by name, or by the number its name starts with.

    Raises:
        ConfigError: there is none, or several begin so.
    """
    if Path(name).suffix == ".ipynb" and Path(name).is_file():
        return Path(name)
    known = sorted(notebooks_folder().glob("*.ipynb"))
    found = [p for p in known if p.stem == name] or [p for p in known if p.stem.startswith(name)]
    if not name or len(found) != 1:
        raise ConfigError(f"{name!r} names {len(found)} notebooks; there are: {', '.join(p.stem for p in known)}")
    return found[0]


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Refuse what papermill would only warn of, before a kernel starts.

    Raises:
        ConfigError: a parameter the notebook does not have, or a value of another type than its default.
    """
    import papermill

    known = papermill.inspect_notebook(str(notebook))
    for name, value in parameters.items():
        if name not in known:
            raise ConfigError(f"{notebook.stem} has no parameter {name!r}; it has: {', '.join(known)}")
        expected = known[name]["inferred_type_name"]
        if expected not in ("None", type(value).__name__) and (expected, type(value)) != ("float", int):
            raise ConfigError(f"{notebook.stem}: {name} is {expected}, got {value!r} ({type(value).__name__})")


def run_notebook(name: str, folder: Path, parameters: dict[str, Any] | None = None) -> StageResult:
    """Execute one notebook into `folder`, unless it has ended well there from the same inputs before.

    The executed copy is kept whether or not it fails. `out` is passed to the notebook as its run folder.

    Raises:
        ConfigError: no such notebook or parameter.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    notebook = find_notebook(name)
    given = {**(parameters or {}), "out": str(folder.resolve())}
    check_parameters(notebook, given)
    key = _input_hash(notebook, given)
    if _finished(folder, key):
        return StageResult(notebook.stem, "skipped", 0.0, folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    started, error = time.perf_counter(), ""
    try:
        papermill.execute_notebook(
            str(notebook),
            str(folder / "notebook.ipynb"),
            parameters=given,
            kernel_name="python3",
            progress_bar=sys.stderr.isatty(),
            cwd=str(folder),
            execution_timeout=CELL_TIMEOUT_S,
            extra_arguments=["--log-level=ERROR"],  # of the kernel, which otherwise warns that it uses TCP
        )
    except papermill.PapermillExecutionError as failed:
        error = f"cell {failed.exec_count}: {failed.ename}: {failed.evalue}"
    except (CellTimeoutError, DeadKernelError, RuntimeError) as failed:
        error = f"{type(failed).__name__}: {failed}"
    hidden = tracebacks(folder / "notebook.ipynb")
    if not error and hidden:
        error = f"an error was hidden from the run: {hidden[0]}"
    if not error and not (folder / "result.json").is_file():
        error = "the notebook ended without writing result.json (its last cell calls nb.finish())"
    result = StageResult(notebook.stem, "failed" if error else "ok", time.perf_counter() - started, folder, error)
    stage = {**asdict(result), "folder": folder.name, "key": key, "parameters": given}
    (folder / "stage.json").write_text(json.dumps(stage, indent=2))
    return result


def run_pipeline(stages: Sequence[Stage], out: Path, *, resume: bool = False) -> Iterator[StageResult]:
    """Run the stages in order, yielding each result as it ends; a failed stage ends the pipeline.

    Raises:
        KitError: `out` holds something already and `resume` is off. ConfigError: a notebook or parameter is unknown;
            all are looked at before the first one runs.
    """
    if out.exists() and any(out.iterdir()) and not resume:
        raise KitError(f"{out} is not empty: go on with --resume, or choose another folder")
    notebooks = [find_notebook(stage.notebook) for stage in stages]
    for notebook, stage in zip(notebooks, stages, strict=True):
        check_parameters(notebook, stage.parameters)
    for notebook, stage in zip(notebooks, stages, strict=True):
        result = run_notebook(str(notebook), out / notebook.stem, stage.parameters)
        yield result
        if result.status == "failed":
            return


def _finished(folder: Path, key: str) -> bool:
    try:
        stage = json.loads((folder / "stage.json").read_text())
    except (OSError, ValueError):
        return False
    return stage.get("key") == key and stage.get("status") == "ok" and (folder / "result.json").is_file()


def _input_hash(notebook: Path, parameters: dict[str, Any]) -> str:
    digest = hashlib.sha256(notebook.read_bytes())
    digest.update(json.dumps(parameters, sort_keys=True).encode())
    for source in sorted(PACKAGE.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()
