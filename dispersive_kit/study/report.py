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

PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 17px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; color: #1b1b1b; }
  h1 { font-size: 1.9rem; margin-bottom: .2rem; } h2 { margin-top: 2.6rem; border-top: 1px solid #ccc; padding-top: 1rem; }
  table { border-collapse: collapse; margin: 1rem 0; } th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid #ddd; }
  td.number { text-align: right; font-variant-numeric: tabular-nums; } figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
  figcaption, .quiet { color: #555; font-size: .92rem; } .failed { color: #a3000b; font-weight: 600; } .found { font-size: 1.08rem; }
  pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; } details { margin: .6rem 0; }
</style></head><body>
<h1>{{ title }}</h1>
<p class="quiet">{{ subtitle }}</p>
<table><tr><th>notebook</th><th>status</th><th>time</th><th>files</th></tr>
{% for stage in stages %}<tr><td><a href="#{{ stage.name }}">{{ stage.name }}</a></td>
<td class="{{ stage.status }}">{{ stage.status }}</td><td class="number">{{ "%.0f s" % stage.seconds }}</td>
<td><a href="{{ stage.folder }}/notebook.ipynb">executed notebook</a></td></tr>{% endfor %}</table>
{% for stage in stages %}
<h2 id="{{ stage.name }}">{{ stage.name }}</h2>
{% if stage.error %}<p class="failed">{{ stage.error }}</p>{% endif %}
{% for sentence in stage.sentences %}<p class="found">{{ sentence }}</p>{% endfor %}
{% if stage.numbers %}<table><tr><th>measured</th><th>value</th><th>95 % interval</th><th>floor</th><th></th></tr>
{% for n in stage.numbers %}<tr><td>{{ n.name }}</td><td class="number">{{ n.value }}</td><td class="number">{{ n.interval }}</td>
<td class="number">{{ n.floor }}</td><td>{{ n.note }}</td></tr>{% endfor %}</table>{% endif %}
{% for figure in stage.figures %}{{ figure | safe }}{% endfor %}
{% if stage.checks %}<details><summary>{{ stage.checks | length }} checks passed</summary><ul>
{% for check in stage.checks %}<li>{{ check.promise }} <span class="quiet">{{ check.detail }}</span></li>{% endfor %}</ul></details>{% endif %}
{% if stage.records %}<details><summary>records: how each number was measured</summary><pre>{{ stage.records }}</pre></details>{% endif %}
{% endfor %}
</body></html>
""",
    autoescape=True,
)


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
    pages = [
        o["data"]["text/html"]
        for c in cells
        for o in c.get("outputs", [])
        if "text/html" in o.get("data", {})
    ]
    return [figure for page in pages for figure in FIGURE.findall("".join(page))]
