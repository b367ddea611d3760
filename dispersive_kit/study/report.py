"""Tables for a terminal, and pages of HTML: each one file that fetches nothing and runs nothing."""

import contextlib
import html
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from dispersive_kit.data.files import lock, read_json, write_json
from dispersive_kit.errors import DataError, KitError
from dispersive_kit.study.notebook import Result, read_result, runs_folder

# A browser that shows a page fetches nothing and runs nothing, whatever a cell put into its output.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; font-src data:"
_STYLE = """
body { font: 17px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; color: #1b1b1b; }
h2 { margin-top: 2.4rem; border-top: 1px solid #ccc; padding-top: 1rem; } figure { margin: 1.3rem 0 !important; }
.anchor-link, .prompt { display: none; }
table { border-collapse: collapse; margin: 1rem 0; } img { max-width: 100%; height: auto; }
th, td { text-align: left; vertical-align: bottom; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #ddd; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.quiet, figcaption { color: #555; font-size: .92rem; }
.failed { color: #a3000b; font-weight: 600; } .better { color: #00694c; font-weight: 700; }
.worse { color: #a34700; font-weight: 700; } .equivalent { color: #005a8d; font-weight: 700; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; } details { margin: .6rem 0; }
"""
_NUMBERS = ("measured", "value", "95 % interval", "floor", "")
Row = Sequence[Any]  # of a table: text, or numbers, or (address, text) for a link; the first row is the header


@dataclass(frozen=True)
class Ended:
    """How a run ended: "ok", "skipped" (unchanged) or "failed", and the folder that holds everything of it."""

    name: str
    status: str
    seconds: float
    folder: Path
    error: str = ""


def as_table(rows: Sequence[Row]) -> str:
    """Rows as text in columns."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def runs_table() -> str:
    """All runs of notebooks in the runs folder. The folders are the registry: it is never out of date."""
    place, rows = runs_folder(), [["run", "status", "mode", "time", "started", "code", "device"]]
    for file in sorted(place.rglob("stage.json")):
        stage, machine = read_json(file, default={}), read_json(file.with_name("environment.json"), default={})
        status = stage.get("status", "killed")
        if status == "running":
            with contextlib.suppress(KitError), lock(file.parent.with_name(f".{file.parent.name}.lock"), busy="held"):
                status = "killed"
        name, mode = file.parent.relative_to(place).as_posix(), stage.get("parameters", {}).get("mode", "")
        seconds = f"{stage['seconds']:.0f} s" if "seconds" in stage else ""
        started, code = stage.get("started", "")[:16].replace("T", " "), (machine.get("commit") or "")[:9]
        rows.append([name, status, mode, seconds, started, code, machine.get("device", "")])
    return as_table(rows) if len(rows) > 1 else f"no runs in {place}"


def html_table(rows: Sequence[Row]) -> str:
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


def folded(summary: str, content: str) -> str:
    """A part of a page that is folded away; content: HTML."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def quoted(text: str, kind: str = "pre") -> str:
    """Plain text as an element of HTML."""
    tag, _, style = kind.partition(".")
    return f'<{tag} class="{style}">{html.escape(text)}</{tag}>' if text else ""


def write_page(file: Path, title: str, *parts: str) -> Path:
    """Write a page of parts, which are HTML; returns `file`."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>{html.escape(title)}</title>'
    head += f"<style>{_STYLE}</style>"
    body = "\n".join([quoted(title, "h1"), *filter(None, parts)])
    file.write_text(f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n', "utf-8")
    return file


def write_notebook_page(notebook: Path) -> None:
    """Write NOTEBOOK.html beside an executed notebook, if it is there; formulas stand as they were typed."""
    if not notebook.is_file():
        return
    import nbformat
    from nbconvert import HTMLExporter

    document = nbformat.read(notebook, as_version=4)
    document.metadata.pop("widgets", None)
    for output in (output for cell in document.cells for output in cell.get("outputs", [])):
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)  # its figure is there too
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(document)
    write_page(notebook.with_suffix(".html"), notebook.parent.name, body)


def write_report(results: Sequence[Ended], out: Path, *, title: str, subtitle: str) -> tuple[Path, list[Row]]:
    """Write `out/report.html` from the runs' folders; returns its path and the table of all numbers."""
    overview: list[Row] = [("stage", "status", "time", "")]
    parts, told = [], list[Row]([_NUMBERS])
    for name, group in groupby(results, lambda run: run.name.partition("/")[0]):
        runs = sorted(group, key=lambda run: run.name)
        counts = Counter(run.status for run in runs)
        status = ", ".join(f"{n} {kind}" if len(runs) > 1 else kind for kind, n in counts.items())
        took = sum(run.seconds or _stage(run).get("seconds", 0.0) for run in runs)
        link = _link(runs[0], out, "executed notebook") if len(runs) == 1 else ""
        overview.append(((f"#{name}", name), status, f"{took:.0f} s", link))
        parts += [f'<h2 id="{name}">{name}</h2>', *map(_fault, runs)]
        shown, rows = _of_grid(runs, out) if "/" in runs[0].name else _of_one_run(runs[0])
        parts += shown
        told += rows
    found = read_json(results[0].folder / "environment.json", default={}) if results else {}
    if found:
        names = ", ".join(f"{name} {found['versions'][name]}" for name in ("python", "torch", "dispersive-kit"))
        parts.append(quoted(f"{found['commit'] or 'an installed package'}; {names}; {found['device']}", "p.quiet"))
    return write_page(out / "report.html", title, quoted(subtitle, "p.quiet"), html_table(overview), *parts), told


def _fault(run: Ended) -> str:
    traceback = _stage(run).get("traceback", "") if run.error else ""
    shown = folded("traceback", quoted(traceback)) if traceback else ""
    return quoted(f"{run.name}: {run.error}", "p.failed") + shown if run.error else ""


def _of_one_run(run: Ended) -> tuple[list[str], list[Row]]:
    """Parts of the page, and the numbers."""
    import nbformat

    result = _result(run)
    if result is None:
        return [], []
    smoke = "Smoke mode: it shows that everything runs. Its numbers mean nothing." if result.mode == "smoke" else ""
    cells = nbformat.read(run.folder / "notebook.ipynb", as_version=4).cells
    pages = [o["data"]["text/html"] for c in cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    checks = "".join(quoted(f"{check['promise']}  {check['detail']}", "li") for check in result.checks)
    records = [number.record for number in result.numbers if number.record]
    rows: list[Row] = [
        _number_row(number.name, number.value, number.record or {}, number.note) for number in result.numbers
    ]
    parts = [
        *(quoted(sentence, "p") for sentence in result.sentences),
        quoted(smoke, "p.quiet"),
        html_table([_NUMBERS, *rows]),
        *(figure for page in pages for figure in re.findall("<figure.*?</figure>", "".join(page), re.DOTALL)),
        folded(f"{len(result.checks)} checks passed", f"<ul>{checks}</ul>") if checks else "",
        folded("records: how each number was measured", quoted(json.dumps(records, indent=1))) if records else "",
    ]
    return parts, rows


def _of_grid(runs: Sequence[Ended], out: Path) -> tuple[list[str], list[Row]]:
    """Parts of the page, and the numbers; the means are written into aggregate.json too."""
    found = _aggregate(runs)
    write_json(out / runs[0].name.partition("/")[0] / "aggregate.json", found)
    parts, told = [], list[Row]()
    for group in found["groups"]:
        point = ", ".join(f"{name} = {value}" for name, value in group["point"].items())
        rows = [_number_row(one["name"], one["mean"], one, f"mean of {one['n']}") for one in group["numbers"]]
        parts += [quoted(point, "h3"), html_table([_NUMBERS, *rows])]
        told += [(", ".join(filter(None, (row[0], point))), *row[1:]) for row in rows]
    parts += [quoted(f"left out: {one['run']}: {one['why']}", "p") for one in found["left_out"]]
    table = [("run", "status", "time"), *((_link(r, out, r.name), r.status, f"{r.seconds:.0f} s") for r in runs)]
    return [*parts, folded(f"the {len(runs)} runs; intervals: Student's t, over seeds", html_table(table))], told


def _aggregate(runs: Sequence[Ended]) -> dict[str, Any]:
    """Mean and 95 % t-interval over seeds of every number, for each point of the grid.

    Failed runs and runs in smoke mode are left out, and named with the reason.
    """
    given = [_stage(run).get("parameters", {}) for run in runs]
    varied = [name for name in given[0] if name != "seed" and len({repr(one.get(name)) for one in given}) > 1]
    groups: dict[str, dict[str, Any]] = {}
    left_out = []
    for run, parameters in zip(runs, given, strict=True):
        result = _result(run)
        if run.status == "failed" or result is None or result.mode == "smoke":  # the mode it ran in, forced or not
            left_out.append({"run": run.name, "why": f"failed: {run.error}" if run.error else "smoke mode"})
            continue
        point = {name: parameters[name] for name in varied}
        group = groups.setdefault(repr(point), {"point": point, "runs": [], "values": {}})
        group["runs"].append(run.name)
        for number in result.numbers:
            group["values"].setdefault(number.name, []).append(number.value)
    for group in groups.values():
        group["numbers"] = [{"name": name, **_summary(values)} for name, values in group.pop("values").items()]
    return {"groups": [*groups.values()], "left_out": left_out}


def _summary(values: list[float]) -> dict[str, Any]:
    from scipy import stats

    mean, n = sum(values) / len(values), len(values)
    if n == 1:
        return {"mean": mean, "n": n}
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def _number_row(name: str, value: float, record: dict[str, Any], note: str) -> Row:
    interval = f"{record['low']:.2f} to {record['high']:.2f}" if record.get("low") is not None else ""
    floor = f"{record['floor']:.2f}" if "floor" in record else ""
    return name, f"{value:.3g}", interval, floor, html.unescape(note)


def _link(run: Ended, out: Path, text: str) -> tuple[str, str]:
    return f"{os.path.relpath(run.folder, out)}/notebook.html", text


def _stage(run: Ended) -> dict[str, Any]:
    return read_json(run.folder / "stage.json", default={})


def _result(run: Ended) -> Result | None:
    with contextlib.suppress(DataError):  # said by the run's own error
        return read_result(run.folder)
    return None
