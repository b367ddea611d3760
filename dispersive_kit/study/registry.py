"""The runs that are there: listed. The folders are the registry: it is never out of date."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispersive_kit.data.files import lock, read_json
from dispersive_kit.errors import DataError, KitError
from dispersive_kit.study.execute import lock_of, read_stage
from dispersive_kit.study.schema import read_result

Row = list[str]


@dataclass(frozen=True)
class Run:
    """One run of a notebook: its name is its folder below that of all runs."""

    name: str
    folder: Path
    stage: dict[str, Any]
    environment: dict[str, Any]
    result: dict[str, Any]

    @property
    def status(self) -> str:
        """ok, failed, running, or killed: it neither ended nor runs."""
        status = self.stage.get("status", "killed")
        return "killed" if status == "running" and not _is_running(self.folder) else status

    @property
    def mode(self) -> str:
        """The mode it ran in; the one asked for if it never came to tell."""
        return self.result.get("mode") or self.stage.get("parameters", {}).get("mode", "")

    @property
    def code(self) -> str:
        """Commit, with a + where files were changed since."""
        commit = self.environment.get("commit") or ""
        return commit[:9] + ("+" if self.environment.get("diff_sha256") else "")


def find_runs(folder: Path) -> list[Run]:
    """All runs below a folder, by name."""
    return [_read(file.parent, folder) for file in sorted(folder.rglob("stage.json"))]


def list_runs(runs: Sequence[Run]) -> list[Row]:
    """A row for each run, under a header."""
    header = ["run", "status", "mode", "time", "started", "code", "device"]
    return [header, *(_row(run) for run in runs)]


def as_table(rows: Sequence[Row]) -> str:
    """Rows as text in columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _read(place: Path, folder: Path) -> Run:
    try:
        result = read_result(place)
    except DataError:  # a failed or killed run; its status says so
        result = {}
    name = place.relative_to(folder).as_posix()
    return Run(name, place, read_stage(place), read_json(place / "environment.json", default={}), result)


def _is_running(folder: Path) -> bool:
    file = lock_of(folder)
    try:
        with lock(file, busy="running") if file.is_file() else contextlib.nullcontext():
            return False
    except KitError:
        return True


def _row(run: Run) -> Row:
    device = run.environment.get("device", "")
    return [run.name, run.status, run.mode, _seconds(run), _started(run), run.code, device]


def _seconds(run: Run) -> str:
    return f"{run.stage['seconds']:.0f} s" if "seconds" in run.stage else ""


def _started(run: Run) -> str:
    return run.stage.get("started", "")[:16].replace("T", " ")
