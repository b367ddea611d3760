"""One offline HTML page over a pipeline's run folder: status, times, numbers with their intervals, pictures."""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import nbformat

from dispersive_kit.study.pipeline import StageResult

FIGURE = re.compile(r"<figure.*?</figure>", re.DOTALL)

PAGE = jinja2.Template(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"), autoescape=True)


def write_report(results: Sequence[StageResult], out: Path, *, title: str, subtitle: str = "") -> Path:
    """Write `out/report.html` from the stages' executed notebooks and result.json files; returns its path."""
    page = out / "report.html"
    stages = [_stage(result, out) for result in results]
    page.write_text(PAGE.render(title=title, subtitle=subtitle, stages=stages), encoding="utf-8")
    return page


def read_result(folder: Path) -> dict[str, Any]:
    """What a stage measured; empty if it did not get that far."""
    file = folder / "result.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _stage(result: StageResult, out: Path) -> dict[str, Any]:
    measured = read_result(result.folder)
    numbers = measured.get("numbers", [])
    records = [n["record"] for n in numbers if n["record"]]
    return {
        "name": result.name,
        "status": result.status,
        "seconds": result.seconds or measured.get("seconds", 0.0),
        "folder": result.folder.relative_to(out),
        "error": result.error,
        "sentences": measured.get("sentences", []),
        "checks": measured.get("checks", []),
        "numbers": [_row(n) for n in numbers],
        "figures": _figures(result.folder / "notebook.ipynb"),
        "records": json.dumps(records, indent=1) if records else "",
    }


def _row(number: dict[str, Any]) -> dict[str, str]:
    record = number["record"] or {}
    interval = f"{record['low']:.2f} to {record['high']:.2f}" if "low" in record else ""
    floor = f"{record['floor']:.2f}" if "floor" in record else ""
    note = html.unescape(number["note"])
    return {
        "name": number["name"],
        "value": f"{number['value']:.3g}",
        "interval": interval,
        "floor": floor,
        "note": note,
    }


def _figures(notebook: Path) -> list[str]:
    if not notebook.is_file():
        return []
    cells = nbformat.read(notebook, as_version=4).cells
    pages = [o["data"]["text/html"] for c in cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    return [figure for page in pages for figure in FIGURE.findall("".join(page))]
