"""How a notebook reports to the kit, and where notebooks and their runs are.

    nb = begin("06_does_it_help", mode=mode, out=out)
    nb.check("base arm beats pixel-Gaussian samples", distance < gaussian, f"{distance:.1f} < {gaussian:.1f}")
    nb.record("FD base", distance, note="one seed: an illustration")
    nb.finish()

`finish` writes result.json, which pipelines and their report read.
"""

import contextlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
import yaml
from pydantic import BaseModel, Field, FiniteFloat, PositiveFloat, PrivateAttr, ValidationError

from dispersive_kit.data.files import write_json
from dispersive_kit.errors import ConfigError, DataError, KitError, form_error

PACKAGE = Path(__file__).resolve().parents[1]
MODE_VARIABLE = "DISPERSIVE_KIT_MODE"  # set by the tests, which run every notebook in smoke mode
Mode = Literal["smoke", "class", "full"]
_MOST_PARTS = 200_000  # JSON tokens of a plan or a pipeline; a value has about two
Name = Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._=,+-]*$")]  # a folder's name, which cannot be a path
F = TypeVar("F", bound=BaseModel)


class Number(BaseModel, extra="forbid"):
    """A measured number. record: how it was measured, with `low`, `high` and `floor` where it has them."""

    name: str
    value: FiniteFloat
    note: str
    record: dict[str, Any] | None


class Result(BaseModel, extra="forbid"):
    """result.json: what one run of a notebook measured."""

    notebook: str
    mode: Mode
    seconds: float = Field(0.0, ge=0)
    peak_gib: PositiveFloat | None = None
    checks: list[dict[str, str]] = []
    numbers: list[Number] = []
    sentences: list[str] = []
    headline: dict[str, Any] = {}


class NotebookRun(Result):
    """One execution of a notebook, in the folder `out`."""

    out: Path = Field(exclude=True)
    _started: float = PrivateAttr(default_factory=time.perf_counter)

    def check(self, promise: str, holds: bool, detail: str = "") -> None:
        """Print and keep a check. Raises AssertionError: it does not hold."""
        if not holds:
            raise AssertionError(f"{promise}: does not hold ({detail})")
        self.checks.append({"promise": promise, "detail": detail})
        print(f"✓ {promise}" + (f"  ({detail})" if detail else ""))

    def record(self, name: str, value: float, *, note: str = "", record: dict[str, Any] | None = None) -> None:
        """Keep a measured number for the report, with the record of how it was measured."""
        self.numbers.append(Number(name=name, value=float(value), note=note, record=record))

    def in_mode(self, **numbers: tuple[Any, Any, Any]) -> SimpleNamespace:
        """From each (smoke, class, full), the number for this run's mode; as attributes."""
        return SimpleNamespace(**{name: values[get_args(Mode).index(self.mode)] for name, values in numbers.items()})

    def try_answer(self, answer: Callable[..., Any], cases: Sequence[tuple[tuple[Any, ...], Any]], hint: str) -> bool:
        """Test an exercise's answer on cases (arguments, right result). Prints the first fault, and the hint."""
        for number, (arguments, right) in enumerate(cases, 1):
            if fault := _fault(answer, arguments, right):
                print(f"not yet, case {number}: {fault}\nhint: {hint}")
                return False
        print(f"✓ right in {len(cases)} cases")
        return True

    def say(self, sentence: str) -> None:
        """Show a finding (Markdown), and put it on the report."""
        from IPython.display import Markdown, display

        self.sentences.append(sentence)
        display(Markdown(sentence))

    def answer(self, verdict: str, interval: str, sentence: str, *, picture: str, measured: dict[str, str]) -> None:
        """Keep the answer to the notebook's question; the report begins with it. picture: a figure as HTML."""
        self.headline = {"verdict": verdict, "interval": interval, "sentence": sentence}
        self.headline |= {"picture": picture, "measured": list(measured.items())}

    def finish(self) -> None:
        """Write result.json into the run folder."""
        self.seconds, self.peak_gib = round(time.perf_counter() - self._started, 1), _peak_memory_gib()
        write_json(self.out / "result.json", self.model_dump())
        print(f"done in {self.seconds:.0f} s; written to {self.out}")


def _fault(answer: Callable[..., Any], arguments: tuple[Any, ...], right: Any) -> str:
    try:
        given = answer(*arguments)
        if given is None:
            return "the function returns nothing yet"
        given, right = (torch.as_tensor(value, dtype=torch.float64) for value in (given, right))
    except Exception as error:  # whatever a student's function may raise
        return f"it raised {type(error).__name__}: {error}"
    if given.shape != right.shape:
        return f"the result has shape {tuple(given.shape)}, not {tuple(right.shape)}"
    if not torch.allclose(given, right, rtol=1e-4, atol=1e-6):
        return f"the result begins {given.flatten()[:2].tolist()}, not {right.flatten()[:2].tolist()}"
    return ""


def begin(name: str, *, mode: str, out: str = "") -> NotebookRun:
    """Open a run of a notebook, by default in a new folder of `runs_folder()`. Raises ConfigError: unknown mode."""
    if forced := os.environ.get(MODE_VARIABLE):
        print(f"{MODE_VARIABLE}={forced} replaces mode={mode!r}")
        mode = forced
    folder = Path(out) if out else runs_folder() / name / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        run = NotebookRun.model_validate({"notebook": name, "mode": mode, "out": folder})
    except ValidationError as fault:
        raise form_error(fault, name) from None
    folder.mkdir(parents=True, exist_ok=True)
    return run


def read_plain(file: Path, missing: str = "", error: type[KitError] = ConfigError) -> Any:
    """The content of a YAML or JSON file. Raises `error`: it cannot be read (`missing` says more), is damaged, or holds
    more than plain values.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            return json.loads(text)
        content = yaml.safe_load(text)
        parts = itertools.islice(json.JSONEncoder(default=str).iterencode(content), _MOST_PARTS)
        if len(list(parts)) == _MOST_PARTS:  # eight lines of nested aliases are a billion values
            raise ValueError("with its aliases written out it is too long")
        return content
    except OSError as fault:
        raise error(f"{missing or file} ({fault.strerror})") from fault
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as fault:
        raise error(f"{file} is not {file.suffix[1:].upper()} of plain values: {fault}") from fault


def read_form(file: Path, form: type[F], missing: str, error: type[KitError] = ConfigError, /, **changes: Any) -> F:
    """A YAML or JSON file as a model, with fields changed. Raises `error`: see `read_plain`; or a field is wrong."""
    content = read_plain(file, missing, error)
    try:
        return form.model_validate({**content, **changes} if isinstance(content, dict) else content)
    except ValidationError as fault:
        raise form_error(fault, str(file), error) from fault


def read_result(folder: Path) -> Result:
    """What the run in `folder` measured. Raises DataError: it has no result.json, or a damaged one."""
    file = folder / "result.json"
    missing = f"{file} is missing: the notebook did not reach its last cell, nb.finish()"
    return read_form(file, Result, missing, DataError)


def runs_folder() -> Path:
    """$DISPERSIVE_KIT_RUNS, else `runs/` of a checkout, else `runs/` below the current folder."""
    if folder := os.environ.get("DISPERSIVE_KIT_RUNS"):
        return Path(folder).expanduser()
    return (PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else Path.cwd()) / "runs"


def notebooks_folder() -> Path:
    """The notebooks of a checkout, or those inside the installed package."""
    inside = PACKAGE / "notebooks"
    return inside if inside.is_dir() else PACKAGE.parent / "notebooks"


def read_notebook(file: Path) -> Any:
    """A notebook as nbformat has it. Raises DataError: the file is none."""
    import nbformat

    try:
        document = nbformat.read(file, as_version=4)
        nbformat.validate(document)
    except Exception as error:  # nbformat's own, of JSON, or of whatever it met while it read
        raise DataError(f"{file} is not a notebook: {type(error).__name__}: {error!s:.200}") from error
    return document


def find_notebook(name: str, beside: Path = Path()) -> Path:
    """A notebook by path (also one `beside` a pipeline's file), by name, or by the number its name starts with.

    Raises ConfigError: no notebook or several start with this name.
    """
    for file in (beside / name, Path(name)):
        if file.suffix == ".ipynb" and file.is_file():
            return file
    known = sorted(notebooks_folder().glob("*.ipynb"))
    found = [p for p in known if p.stem == name] or [p for p in known if p.stem.startswith(name)]
    if not name or len(found) != 1:
        raise ConfigError(f"{name!r} names {len(found)} notebooks; there are: {', '.join(p.stem for p in known)}")
    return found[0]


def _peak_memory_gib() -> float | None:
    """The largest memory of this process so far; None if the system does not report it."""
    with contextlib.suppress(OSError):  # not getrusage: its ru_maxrss is inherited from the process that started this
        return round(int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 2**20, 2)
    return None
