"""One notebook run headlessly through papermill, in a folder that keeps everything of it.

    notebook.ipynb  notebook.html    as executed; a failed one is kept too
    params.json     environment.json
    stage.json                       how it ended, and the hash of its inputs
    result.json     metrics.jsonl    what it measured, and logged in training (where it trained)
    log.txt                          what it printed, and the traceback of a failure

A run whose inputs (notebook, parameters, package) are unchanged since it ended well is not run again. One that was
killed goes on: its folder is left as it is, so that a training in it resumes from its checkpoint.
"""

import hashlib
import io
import json
import logging
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispersive_kit.data.files import lock, read_json, write_json
from dispersive_kit.errors import DataError, KitError
from dispersive_kit.study.environment import describe_environment, package_hash
from dispersive_kit.study.gate import tracebacks
from dispersive_kit.study.lookup import check_parameters, find_notebook
from dispersive_kit.study.notebook import MODE_VARIABLE
from dispersive_kit.study.schema import read_result
from dispersive_kit.study.webpage import write_page

CELL_TIMEOUT_S = 3600  # of a notebook in smoke or class mode; a training in full mode takes what it takes
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class StageResult:
    """How a run ended: "ok", "skipped" (unchanged) or "failed", and the folder that holds everything of it."""

    name: str
    status: str
    seconds: float
    folder: Path
    error: str = ""


class CleanLog(io.StringIO):
    """A log written as it comes, without colours and without the overwritten states of progress bars."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file, self.rest = file.resolve(), ""  # while a notebook runs, its folder is the current one
        file.write_text("")

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + ANSI.sub("", text).replace("\r\n", "\n")).split("\n")
        with self.file.open("a", encoding="utf-8") as log:
            log.writelines(line.rstrip("\r").rpartition("\r")[2] + "\n" for line in lines)
        return len(text)


def run_notebook(name: str, folder: Path, parameters: dict[str, Any] | None = None, *, label: str = "") -> StageResult:
    """Execute one notebook into `folder`, unless it has ended well there from the same inputs before.

    The folder is passed to the notebook as `out`. Files of a run from other inputs are moved to FOLDER.earlier-1.
    While another process runs in the folder, this one waits.

    Raises:
        ConfigError: no such notebook or parameter, or a value of the wrong type. KitError: the folder holds something
            else than a run of a notebook.
    """
    notebook, given = find_notebook(name), parameters or {}
    check_parameters(notebook, given)
    label, key = label or notebook.stem, input_hash(notebook, given)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(lock_of(folder)):
        if ended_well(notebook, folder, given):
            return StageResult(label, "skipped", 0.0, folder)
        if not read_stage(folder) and folder.exists() and any(folder.iterdir()):
            raise KitError(f"{folder} holds no run of a notebook, and is not empty: name another folder with --out")
        if read_stage(folder).get("key", key) != key:
            folder.rename(_unused_name(folder))
        return _run(notebook, folder, given, label, key)


def ended_well(notebook: Path, folder: Path, parameters: dict[str, Any]) -> bool:
    """Whether the run in `folder` was of these inputs, and ended well."""
    stage = read_stage(folder)
    same = stage.get("key") == input_hash(notebook, parameters)
    return same and stage["status"] == "ok" and (folder / "result.json").is_file()


def _run(notebook: Path, folder: Path, given: dict[str, Any], label: str, key: str) -> StageResult:
    folder.mkdir(exist_ok=True)
    for leftover in ("result.json", "metrics.jsonl"):  # of an attempt that did not end well
        (folder / leftover).unlink(missing_ok=True)
    stage = {"name": label, "notebook": notebook.stem, "key": key, "parameters": given, "status": "running"}
    stage["started"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_json(folder / "stage.json", stage)
    write_json(folder / "params.json", given)
    write_json(folder / "environment.json", describe_environment())
    started, log = time.perf_counter(), CleanLog(folder / "log.txt")
    error, traceback = _execute(notebook, folder, given, log)
    error = error or _hidden_fault(folder)
    log.write(f"\n{traceback or error}\n" if error else "\n")
    _gather_metrics(folder)
    write_page(folder / "notebook.ipynb")
    result = StageResult(label, "failed" if error else "ok", time.perf_counter() - started, folder, error)
    ended = {"status": result.status, "seconds": round(result.seconds, 1), "error": error, "traceback": traceback}
    write_json(folder / "stage.json", {**stage, **ended})
    return result


def _execute(notebook: Path, folder: Path, given: dict[str, Any], log: CleanLog) -> tuple[str, str]:
    """Error in one line and traceback; both empty if the notebook came to its end."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    from dispersive_kit.study.lab import Kernel

    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        papermill.execute_notebook(
            str(notebook),
            str(folder.resolve() / "notebook.ipynb"),
            parameters={**given, "out": str(folder.resolve())},
            kernel_name="python3",
            kernel_manager_class=Kernel,
            progress_bar=sys.stderr.isatty(),
            stdout_file=log,
            stderr_file=log,
            cwd=str(folder),
            execution_timeout=None if given.get("mode") == "full" else CELL_TIMEOUT_S,
            extra_arguments=["--log-level=CRITICAL"],  # of the kernel: it calls its own end an error
        )
    except papermill.PapermillExecutionError as failed:
        place = f"cell {failed.exec_count}: {failed.ename}: {failed.evalue}"
        return place, ANSI.sub("", "\n".join(failed.traceback))
    except (CellTimeoutError, DeadKernelError, RuntimeError) as failed:  # RuntimeError: of the start
        return f"{type(failed).__name__}: {failed}", ""
    return "", ""


def _hidden_fault(folder: Path) -> str:
    """What did not stop the notebook but fails the run: an error in a widget or thread, a result of the wrong form."""
    if hidden := tracebacks(folder / "notebook.ipynb"):
        return f"an error was hidden from the run: {hidden[0]}"
    try:
        read_result(folder)
    except DataError as fault:
        return str(fault)
    return ""


def _gather_metrics(folder: Path) -> None:
    """Bring what the trainings inside a run logged into one metrics.jsonl, each line with the name of its training."""
    lines = [
        json.dumps({"run": str(file.parent.relative_to(folder)), **json.loads(line)})
        for file in sorted(folder.rglob("metrics.jsonl"))
        for line in file.read_text().splitlines()
    ]
    if lines:
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def read_stage(folder: Path) -> dict[str, Any]:
    """The stage.json of a run: how far it came, and from what inputs; empty if there is none."""
    return read_json(folder / "stage.json", default={})


def lock_of(folder: Path) -> Path:
    """The file that a run in `folder` holds locked; beside it, since the folder may be moved."""
    return folder.with_name(f".{folder.name}.lock")


def input_hash(notebook: Path, parameters: dict[str, Any]) -> str:
    """sha256 of what a run depends on: the notebook, its parameters, a forced mode and the package."""
    digest = hashlib.sha256(notebook.read_bytes())
    inputs = [parameters, os.environ.get(MODE_VARIABLE), package_hash()]
    digest.update(json.dumps(inputs, sort_keys=True).encode())
    return digest.hexdigest()


def _unused_name(folder: Path) -> Path:
    number = 1
    while (earlier := folder.with_name(f"{folder.name}.earlier-{number}")).exists():
        number += 1
    return earlier
