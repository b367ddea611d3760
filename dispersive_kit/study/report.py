"""Tables for a terminal, and pages of HTML: each one file that fetches nothing and runs nothing."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader
from pydantic import BaseModel, Field

from dispersive_kit.errors import DataError, printable
from dispersive_kit.study.notebook import Number, read_form, read_notebook, read_result
from dispersive_kit.study.plan import Plan
from dispersive_kit.study.verdict import WORDS, verdict_rows

_NUMBERS = ("measured", "value", "95 % interval", "floor", "")
_PAGES = Environment(loader=FileSystemLoader(Path(__file__).with_name("pages")), autoescape=True)
_PAGES.filters["indented"] = partial(json.dumps, indent=1)


class NotebookTask(BaseModel):
    """stage.json: one run of a notebook, what it depends on, and how it ended.

    name: its folder below that of the pipeline. skipped: it had ended well, and nothing changed since.
    """

    name: str
    notebook: Path = Path()
    parameters: dict[str, Any] = {}
    folder: Path = Field(Path(), exclude=True)
    status: Literal["planned", "running", "ok", "failed", "skipped"] = "planned"
    key: str = ""
    started: str = ""
    seconds: float = 0.0
    error: str = ""
    traceback: str = ""
    environment: dict[str, Any] = {}


def read_task(folder: Path) -> NotebookTask | None:
    """The run in `folder`, if there is one.

    Raises:
        DataError: its stage.json is damaged.
    """
    if not (file := folder / "stage.json").is_file():
        return None
    return read_form(file, NotebookTask, str(file), DataError, folder=folder)


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text in columns, without what a terminal would obey."""
    cells = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in cells)
    return "\n".join(map(str.rstrip, lines))


def _write_page(file: Path, template: str, **content: Any) -> Path:
    """Write a page from pages/TEMPLATE.html.j2; text in it is text, not HTML. Returns `file`."""
    file.write_text(_PAGES.get_template(f"{template}.html.j2").render(content), encoding="utf-8")
    return file


def write_notebook_page(notebook: Path) -> None:
    """Write NOTEBOOK.html beside an executed notebook, if it is there; formulas stand as they were typed."""
    if not notebook.is_file():
        return
    from nbconvert import HTMLExporter

    document = read_notebook(notebook)
    document.metadata.pop("widgets", None)
    for output in (output for cell in document.cells for output in cell.get("outputs", [])):
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)  # its figure is there too
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(document)
    _write_page(notebook.with_suffix(".html"), "page", title=notebook.parent.name, body=body)


def write_report(tasks: Sequence[NotebookTask], out: Path, *, title: str, subtitle: str) -> tuple[Path, str]:
    """Write `out/report.html` from the runs' folders; returns its path and the table of all numbers."""
    stages = [_stage(name, list(runs)) for name, runs in groupby(tasks, lambda run: run.name.partition("/")[0])]
    numbers = [(", ".join(filter(None, (row[0], point))), *row[1:])
               for stage in stages for point, rows in stage["points"].items() for row in rows[1:]]  # fmt: skip
    content = {"title": title, "subtitle": subtitle, "stages": stages, "found": tasks[0].environment if tasks else {}}
    return _write_page(out / "report.html", "report", **content), as_table([_NUMBERS, *numbers])


def _stage(name: str, runs: list[NotebookTask]) -> dict[str, Any]:
    """What the report says of a stage: of one run all that it left, of several the means over seeds.

    Failed runs enter no mean, nor do those in smoke mode; each is named with the reason.
    """
    varied = [name for name in runs[0].parameters if len({repr(run.parameters.get(name)) for run in runs}) > 1]
    left_out, points = dict[str, str](), dict[str, dict[str, list[Number]]]()
    alone: dict[str, Any] = {"result": None, "figures": []}
    for run in runs:
        result = None if run.error else read_result(run.folder)
        if not result or (result.mode == "smoke" and len(runs) > 1):  # the mode it ran in, forced or not
            left_out[run.name] = run.error or "smoke mode"
            continue
        point = ", ".join(f"{name} = {run.parameters[name]}" for name in varied if name != "seed")
        for number in result.numbers:
            points.setdefault(point, {}).setdefault(number.name, []).append(number)
        if len(runs) == 1:
            alone = {"result": result, "figures": _figures(run)}
    tables = {point: [_NUMBERS, *(_row(*one) for one in numbers.items())] for point, numbers in points.items()}
    status = ", ".join(f"{n} {kind}" for kind, n in Counter(run.status for run in runs).items())
    status = status if len(runs) > 1 else runs[0].status
    return {"name": name, "runs": runs, "status": status, "left_out": left_out, "points": tables, **alone}


def _figures(run: NotebookTask) -> list[str]:
    outputs = (o for cell in read_notebook(run.folder / "notebook.ipynb").cells for o in cell.get("outputs", []))
    pages = ("".join(output.get("data", {}).get("text/html", "")) for output in outputs)
    return [figure for page in pages for figure in re.findall("<figure.*?</figure>", page, re.DOTALL)]


def _row(name: str, numbers: Sequence[Number]) -> tuple[str, ...]:
    """One number with its interval and floor; several as their mean, with the 95 % t-interval."""
    from scipy import stats

    values = [number.value for number in numbers]
    mean, record, note = sum(values) / len(values), numbers[0].record or {}, numbers[0].note
    if len(values) > 1:
        low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
        record, note = {"low": low, "high": high}, f"mean of {len(values)}"
    interval = f"{record['low']:.2f} to {record['high']:.2f}" if record.get("low") is not None else ""
    return name, f"{mean:.3g}", interval, f"{record['floor']:.2f}" if "floor" in record else "", note


def write_study_page(plan: Plan, results: Mapping[str, Any], figures: Sequence[str], file: Path) -> Path:
    """Write the page of a study; figures are HTML. Returns `file`."""
    text, words = plan.file.read_text(encoding="utf-8"), WORDS.replace("*", "")
    content = {"plan": plan, "text": text, "words": words, "figures": figures, "rows": verdict_rows(results)}
    return _write_page(file, "study", title=results["title"], results=results, **content)
