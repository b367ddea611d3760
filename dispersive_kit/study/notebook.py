"""What a notebook says to the kit: where it writes, in which mode it runs, and what it measured.

    nb = begin("06_does_it_help", mode=mode, out=out)
    nb.check("base arm beats pixel-Gaussian samples", distance < gaussian, f"{distance:.1f} < {gaussian:.1f}")
    nb.record("FD base", distance, note="one seed: an illustration")
    nb.finish()

The pipeline and its report read the `result.json` that `finish` writes.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dispersive_kit.data.files import write_json
from dispersive_kit.errors import ConfigError
from dispersive_kit.study.environment import peak_memory_gib
from dispersive_kit.study.modes import MODES, settings_of

MODE_VARIABLE = "DISPERSIVE_KIT_MODE"  # set by the tests, which run every notebook in smoke mode


class CheckError(AssertionError):
    """A check of a notebook did not hold."""


@dataclass
class NotebookRun:
    """One execution of a notebook. `settings` holds its preset numbers for the mode."""

    name: str
    mode: str
    out: Path
    settings: Any
    started: float = field(default_factory=time.perf_counter)
    checks: list[dict[str, str]] = field(default_factory=list)
    numbers: list[dict[str, Any]] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)

    def check(self, promise: str, holds: bool, detail: str = "") -> None:
        """Print and keep a check.

        Raises:
            CheckError: it does not hold.
        """
        if not holds:
            raise CheckError(f"{promise}: does not hold ({detail})")
        self.checks.append({"promise": promise, "detail": detail})
        print(f"✓ {promise}" + (f"  ({detail})" if detail else ""))

    def record(self, name: str, value: float, *, note: str = "", record: dict[str, Any] | None = None) -> None:
        """Keep a measured number for the report, with the record of how it was measured."""
        self.numbers.append({"name": name, "value": float(value), "note": note, "record": record})

    def say(self, sentence: str) -> None:
        """Print a finding, and put it on the report."""
        self.sentences.append(sentence)
        print(sentence)

    def finish(self) -> None:
        """Write result.json into the run folder."""
        result = {
            "notebook": self.name,
            "mode": self.mode,
            "seconds": round(time.perf_counter() - self.started, 1),
            "peak_gib": peak_memory_gib(),
            "checks": self.checks,
            "numbers": self.numbers,
            "sentences": self.sentences,
        }
        write_json(self.out / "result.json", result)
        print(f"done in {result['seconds']:.0f} s; written to {self.out}")


def begin(name: str, *, mode: str, out: str = "") -> NotebookRun:
    """Open a run of the notebook `name`; with no `out`, in a new folder below `runs_folder()`.

    Raises:
        ConfigError: unknown mode.
    """
    forced = os.environ.get(MODE_VARIABLE)
    if forced and forced != mode:
        print(f"{MODE_VARIABLE}={forced} replaces mode={mode!r}")
    mode = forced or mode
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; there are: {', '.join(MODES)}")
    folder = Path(out) if out else runs_folder() / name / time.strftime("%Y%m%d-%H%M%S")
    if not out and folder.exists():
        folder = folder.with_name(f"{folder.name}-{os.getpid()}")
    folder.mkdir(parents=True, exist_ok=True)
    return NotebookRun(name, mode, folder, settings_of(name, mode))


def runs_folder() -> Path:
    """$DISPERSIVE_KIT_RUNS, else `runs/` of a checkout, else `runs/` below the current folder."""
    if folder := os.environ.get("DISPERSIVE_KIT_RUNS"):
        return Path(folder).expanduser()
    checkout = Path(__file__).resolve().parents[2]
    return (checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()) / "runs"
