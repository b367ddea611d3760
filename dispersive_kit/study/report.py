"""Tables for a terminal, and pages of HTML: each one file that fetches nothing and runs nothing."""

import contextlib
import html
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from dispersive_kit.data.files import lock
from dispersive_kit.errors import DataError, KitError, printable
from dispersive_kit.study.notebook import Result, read_form, read_notebook, read_result, runs_folder
from dispersive_kit.study.plan import Plan
from dispersive_kit.study.verdict import WORDS, verdict_rows

# A browser that shows a page fetches nothing and runs nothing, whatever a cell put into its output.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; font-src data:"
_STYLE = """
body { font: 17px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; color: #1b1b1b; }
h2 { margin-top: 2.4rem; border-top: 1px solid #ccc; padding-top: 1rem; } figure { margin: 1.3rem 0 !important; }
.anchor-link, .prompt { display: none; }
table { border-collapse: collapse; margin: 1rem 0; } img { max-width: 100%; height: auto; }
th, td { text-align: left; vertical-align: bottom; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #ddd; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.quiet, figcaption { color: #555; font-size: .92rem; }
.failed { color: #a3000b; font-weight: 600; } .better { color: #00694c; font-weight: 700; }
.worse { color: #a34700; font-weight: 700; } .equivalent { color: #005a8d; font-weight: 700; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; } details { margin: .6rem 0; }
"""
_NUMBERS = ("measured", "value", "95 % interval", "floor", "")
Row = Sequence[Any]  # of a table: text, or numbers, or (address, text) for a link; the first row is the header


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

    def failed(self, error: str) -> "NotebookTask":
        return self.model_copy(update={"status": "failed", "error": error})


def read_task(folder: Path) -> NotebookTask | None:
    """The run in `folder`, if there is one.

    Raises:
        DataError: its stage.json is damaged.
    """
    if not (file := folder / "stage.json").is_file():
        return None
    return read_form(file, NotebookTask, str(file), DataError, folder=folder)


def _result(task: NotebookTask) -> Result | None:
    """What it measured; None where it failed before that, which its error says."""
    with contextlib.suppress(DataError):
        return read_result(task.folder)
    return None


def as_table(rows: Sequence[Row]) -> str:
    """Rows as text in columns, without what a terminal would obey."""
    cells = [[printable(str(cell)).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def runs_table() -> str:
    """All runs of notebooks in the runs folder. The folders are the registry: it is never out of date."""
    place, rows = runs_folder(), [["run", "status", "mode", "time", "started", "code", "device"]]
    walked = os.walk(place, onerror=_unlisted) if place.exists() else ()
    for folder in sorted(Path(at) for at, _, files in walked if "stage.json" in files):
        name = folder.relative_to(place).as_posix()
        try:
            task = read_task(folder)
        except DataError as damaged:
            rows.append([name, str(damaged), *[""] * 5])
            continue
        assert task
        status: str = task.status
        if status == "running":
            with contextlib.suppress(KitError), lock(folder.with_name(f".{folder.name}.lock"), busy="held"):
                status = "killed"
        seconds, started = f"{task.seconds:.0f} s" if task.seconds else "", task.started[:16].replace("T", " ")
        code, device = (str(task.environment.get(name) or "") for name in ("commit", "device"))
        rows.append([name, status, str(task.parameters.get("mode", "")), seconds, started, code[:9], device])
    return as_table(rows) if len(rows) > 1 else f"no runs in {place}"


def _unlisted(fault: OSError) -> None:
    raise DataError(f"{fault.filename} cannot be listed ({fault.strerror}), so runs in it would be left out")


def _html_table(rows: Sequence[Row]) -> str:
    """Rows as HTML: numbers stand right, a column in which nothing stands is left out, a word is its own class."""
    head, *body = rows
    shown = [i for i in range(len(head)) if any(row[i] not in ("", None) for row in body)]
    lines = ["".join(f"<th>{html.escape(str(head[i]))}</th>" for i in shown)]
    lines += ["".join(_cell(row[i]) for i in shown) for row in body]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _cell(content: Any) -> str:
    address, text = content if isinstance(content, tuple) else ("", "" if content is None else str(content))
    kind = "number" if text[:1].isdigit() else text if text.isalpha() else ""
    text = html.escape(text)
    return f'<td class="{kind}">' + (f'<a href="{html.escape(address)}">{text}</a>' if address else text) + "</td>"


def _folded(summary: str, content: str) -> str:
    """A part of a page that is folded away; content: HTML, and without any there is no part."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>" if content else ""


def _quoted(text: str, kind: str = "pre") -> str:
    """Plain text as an element of HTML."""
    tag, _, style = kind.partition(".")
    return f'<{tag} class="{style}">{html.escape(text)}</{tag}>' if text else ""


def _write_page(file: Path, title: str, *parts: str) -> Path:
    """Write a page of parts, which are HTML; returns `file`."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>{html.escape(title)}</title>'
    head += f"<style>{_STYLE}</style>"
    body = "\n".join([_quoted(title, "h1"), *filter(None, parts)])
    file.write_text(f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n', "utf-8")
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
    _write_page(notebook.with_suffix(".html"), notebook.parent.name, body)


def write_report(results: Sequence[NotebookTask], out: Path, *, title: str, subtitle: str) -> tuple[Path, list[Row]]:
    """Write `out/report.html` from the runs' folders; returns its path and the table of all numbers."""
    overview: list[Row] = [("stage", "status", "time", "")]
    parts, told = [], list[Row]([_NUMBERS])
    for name, group in groupby(results, lambda run: run.name.partition("/")[0]):
        runs = sorted(group, key=lambda run: run.name)
        status = ", ".join(f"{n} {kind}" for kind, n in Counter(run.status for run in runs).items())
        link = _link(runs[0], out, "executed notebook") if len(runs) == 1 else ""
        took = f"{sum(run.seconds for run in runs):.0f} s"
        overview.append(((f"#{name}", name), runs[0].status if link else status, took, link))
        parts.append(f'<h2 id="{name}">{name}</h2>')
        for run in (run for run in runs if run.error):
            parts += [_quoted(f"{run.name}: {run.error}", "p.failed"), _folded("traceback", _quoted(run.traceback))]
        shown, rows = _of_grid(runs, out) if "/" in runs[0].name else _of_one_run(runs[0])
        parts += shown
        told += rows
    if found := results[0].environment if results else {}:
        names = ", ".join(f"{name} {found['versions'][name]}" for name in ("python", "torch", "dispersive-kit"))
        parts.append(_quoted(f"{found['commit'] or 'an installed package'}; {names}; {found['device']}", "p.quiet"))
    return _write_page(out / "report.html", title, _quoted(subtitle, "p.quiet"), _html_table(overview), *parts), told


def _of_one_run(run: NotebookTask) -> tuple[list[str], list[Row]]:
    """Parts of the page, and the numbers."""
    if not (result := _result(run)):
        return [], []
    smoke = "Smoke mode: it shows that everything runs. Its numbers mean nothing." if result.mode == "smoke" else ""
    cells = read_notebook(run.folder / "notebook.ipynb").cells
    pages = [o["data"]["text/html"] for c in cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    checks = "\n".join(f"{check['promise']}  {check['detail']}" for check in result.checks)
    records = [number.record for number in result.numbers if number.record]
    rows = [_number_row(number.name, number.value, number.record or {}, number.note) for number in result.numbers]
    parts = [
        *(_quoted(sentence, "p") for sentence in result.sentences),
        _quoted(smoke, "p.quiet"),
        _html_table([_NUMBERS, *rows]),
        *(figure for page in pages for figure in re.findall("<figure.*?</figure>", "".join(page), re.DOTALL)),
        _folded(f"{len(result.checks)} checks passed", _quoted(checks)),
        _folded("records: how each number was measured", _quoted(json.dumps(records, indent=1) if records else "")),
    ]
    return parts, rows


def _of_grid(runs: Sequence[NotebookTask], out: Path) -> tuple[list[str], list[Row]]:
    """Parts of the page, and the numbers: means over seeds for each point of the grid.

    Failed runs and runs in smoke mode are left out, and named with the reason.
    """
    varied = [name for name in runs[0].parameters if len({repr(run.parameters.get(name)) for run in runs}) > 1]
    points, parts, told = dict[str, dict[str, list[float]]](), list[str](), list[Row]()
    for run in runs:
        result = _result(run)
        if run.error or result is None or result.mode == "smoke":  # the mode it ran in, forced or not
            parts.append(_quoted(f"left out: {run.name}: {f'failed: {run.error}' if run.error else 'smoke mode'}", "p"))
            continue
        point = ", ".join(f"{name} = {run.parameters[name]}" for name in varied if name != "seed")
        for number in result.numbers:
            points.setdefault(point, {}).setdefault(number.name, []).append(number.value)
    for point, values in points.items():
        rows = [_number_row(name, *_mean(x), f"mean of {len(x)}") for name, x in values.items()]
        parts += [_quoted(point, "h3"), _html_table([_NUMBERS, *rows])]
        told += [(", ".join(filter(None, (row[0], point))), *row[1:]) for row in rows]
    table = [("run", "status", "time"), *((_link(r, out, r.name), r.status, f"{r.seconds:.0f} s") for r in runs)]
    return [*parts, _folded(f"the {len(runs)} runs; intervals: Student's t, over seeds", _html_table(table))], told


def _mean(x: list[float]) -> tuple[float, dict[str, float]]:
    """The mean, and the ends of its 95 % t-interval: one value has none."""
    from scipy import stats

    mean = sum(x) / len(x)
    if len(x) == 1:
        return mean, {}
    low, high = stats.t.interval(0.95, len(x) - 1, mean, stats.sem(x))
    return mean, {"low": low, "high": high}


def _number_row(name: str, value: float, record: dict[str, Any], note: str) -> Row:
    interval = f"{record['low']:.2f} to {record['high']:.2f}" if record.get("low") is not None else ""
    floor = f"{record['floor']:.2f}" if "floor" in record else ""
    return name, f"{value:.3g}", interval, floor, html.unescape(note)


def _link(run: NotebookTask, out: Path, text: str) -> tuple[str, str]:
    return f"{os.path.relpath(run.folder, out)}/notebook.html", text


def write_study_page(plan: Plan, results: Mapping[str, Any], figures: Sequence[str], file: Path) -> Path:
    """Write the page of a study; figures are HTML. Returns `file`."""
    hours = results["cpu_hours"]
    of = (
        f"Plan {plan.name}, sha256 {plan.sha256[:16]}. {len(results['runs'])} runs and {len(results['tuning'])} "
        f"for tuning; {hours['used']:.2f} CPU hours, {hours['planned']:.2f} planned. Margin: {plan.margin_from}"
    )
    details = {"how it was measured": "record", "numbers that describe each arm": "summary",
               "code and machine": "environments", f"{len(results['runs'])} runs": "runs"}  # fmt: skip
    return _write_page(
        file,
        results["title"],
        _quoted(results["question"], "p") + _quoted(of, "p.quiet"),
        _html_table(verdict_rows(results)),
        *figures,
        _folded("what the words mean", _quoted(WORDS.replace("*", ""))),
        _folded("the plan", _quoted(plan.file.read_text(encoding="utf-8"))),
        *(_folded(title, _quoted(json.dumps(results[part], indent=1))) for title, part in details.items()),
    )
