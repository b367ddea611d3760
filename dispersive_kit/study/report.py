"""One offline HTML page over a pipeline's run folder: status, times, numbers with their intervals, pictures."""

import html
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from dispersive_kit.data.files import read_json
from dispersive_kit.errors import DataError
from dispersive_kit.study.execute import StageResult, read_stage
from dispersive_kit.study.schema import read_result
from dispersive_kit.study.webpage import OFFLINE

FIGURE = re.compile(r"<figure.*?</figure>", re.DOTALL)

PAGE = jinja2.Template(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"), autoescape=True)


def write_report(results: Sequence[StageResult], out: Path, *, title: str, subtitle: str = "") -> Path:
    """Write `out/report.html` from the runs' folders; returns its path. The runs of a sweep share one section."""
    page = out / "report.html"
    stages = [_stage(name, list(runs), out) for name, runs in groupby(results, lambda r: r.name.partition("/")[0])]
    where = _environment(results[0].folder) if results else ""
    text = PAGE.render(title=title, subtitle=subtitle, stages=stages, environment=where, offline=OFFLINE)
    page.write_text(text, encoding="utf-8")
    return page


def measured_numbers(folder: Path) -> list[dict[str, Any]]:
    """The recorded numbers of a run; none if it did not get that far."""
    return _measured(folder).get("numbers", [])


def aggregated_numbers(folder: Path) -> list[dict[str, Any]]:
    """The means of a sweep, each named with its point of the grid and noted with interval and number of runs."""
    groups = [_group(group) for group in read_json(folder / "aggregate.json", default={}).get("groups", [])]
    return [
        {
            "name": ", ".join(filter(None, (number["name"], group["point"]))),
            "value": number["mean"],
            "note": f"mean of {number['n']}" + (f", {number['interval']}" if number["interval"] else ""),
        }
        for group in groups
        for number in group["numbers"]
    ]


def _measured(folder: Path) -> dict[str, Any]:
    try:
        return read_result(folder)
    except DataError:  # said by the run's own error
        return {}


def _stage(name: str, results: list[StageResult], out: Path) -> dict[str, Any]:
    runs = [_run(result, out) for result in sorted(results, key=lambda r: r.name)]
    counts = Counter(run["status"] for run in runs)
    aggregate = read_json(out / name / "aggregate.json", default={})
    return {
        "name": name,
        "kind": "failed" if "failed" in counts else "",
        "status": next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {kind}" for kind, n in counts.items()),
        "seconds": sum(run["seconds"] for run in runs),
        "runs": runs,
        "groups": [_group(group) for group in aggregate.get("groups", [])],
        "left_out": aggregate.get("left_out", []),
    }


def _run(result: StageResult, out: Path) -> dict[str, Any]:
    measured, stage = _measured(result.folder), read_stage(result.folder)
    numbers = measured.get("numbers", [])
    records = [n["record"] for n in numbers if n["record"]]
    return {
        "name": result.name,
        "status": result.status,
        "seconds": result.seconds or stage.get("seconds", 0.0),
        "memory": f"{measured['peak_gib']:.1f} GiB" if measured.get("peak_gib") else "",
        "mode": measured.get("mode", ""),
        "folder": result.folder.relative_to(out),
        "error": result.error,
        "traceback": stage.get("traceback", "") if result.status == "failed" else "",
        "sentences": measured.get("sentences", []),
        "checks": measured.get("checks", []),
        "numbers": [_row(n) for n in numbers],
        "figures": _figures(result.folder / "notebook.ipynb"),
        "records": json.dumps(records, indent=1) if records else "",
    }


def _row(number: dict[str, Any]) -> dict[str, str]:
    record = number["record"] or {}
    return {
        "name": number["name"],
        "value": f"{number['value']:.3g}",
        "interval": _interval(record),
        "floor": f"{record['floor']:.2f}" if "floor" in record else "",
        "note": html.unescape(number["note"]),
    }


def _group(group: dict[str, Any]) -> dict[str, Any]:
    point = ", ".join(f"{name} = {value}" for name, value in group["point"].items())
    numbers = [{**n, "value": f"{n['mean']:.3g}", "interval": _interval(n)} for n in group["numbers"]]
    return {"point": point, "n": len(group["runs"]), "numbers": numbers}


def _interval(record: dict[str, Any]) -> str:
    return f"{record['low']:.2f} to {record['high']:.2f}" if "low" in record else ""


def _environment(folder: Path) -> str:
    found = read_json(folder / "environment.json", default={})
    if not found:
        return ""
    code = f"commit {found['commit'][:9]}" if found["commit"] else "an installed package"
    changed = " with uncommitted changes" if found["diff_sha256"] else ""
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("python", "torch", "dispersive-kit"))
    return f"{code}{changed}; {versions}; {found['device']}"


def _figures(notebook: Path) -> list[str]:
    if not notebook.is_file():
        return []
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    pages = [o["data"]["text/html"] for c in cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    return [figure for page in pages for figure in FIGURE.findall("".join(page))]
