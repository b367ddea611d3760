"""What a study found, as lines for a terminal and as one offline HTML page."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from dispersive_kit.study.plan import Plan
from dispersive_kit.study.report import OFFLINE, Row

PAGE = jinja2.Template(Path(__file__).with_name("study.html.j2").read_text(encoding="utf-8"), autoescape=True)


def verdict_rows(results: dict[str, Any]) -> list[Row]:
    """A row for each verdict, under a header."""
    header = ["", "arm", "condition", "measure", "verdict", "ratio", "95 %", "p", "adjusted", "pairs"]
    return [header, *(_row(v) for v in results["verdicts"])]


def _row(v: dict[str, Any]) -> Row:
    word = v["word"] + (" (regulariser inactive)" if v["inactive"] else "")
    shown = _as_ratio(v)
    what = [v["role"], v["arm"], v["condition"], v["measure"], word]
    return [*what, shown["ratio"], shown["interval"], f"{v['p']:.3f}", f"{v['p_adjusted']:.3f}", str(v["n"])]


def _as_ratio(v: dict[str, Any]) -> dict[str, str]:
    low, high = math.exp(v["low"]), math.exp(v["high"])
    return {"ratio": f"{math.exp(v['mean']):.3f}", "interval": f"{low:.3f} to {high:.3f}"}


def write_study_report(plan: Plan, results: dict[str, Any], figures: Sequence[str], file: Path) -> Path:
    """Write the page; figures are HTML elements. Returns `file`."""
    shown = {**results, "verdicts": [{**v, **_as_ratio(v)} for v in results["verdicts"]]}
    measures = list(dict.fromkeys(name for row in results["summary"] for name in row["values"]))
    page = PAGE.render(
        r=shown,
        p=plan,
        measures=measures,
        figures=figures,
        plan_text=plan.file.read_text(encoding="utf-8"),
        record=json.dumps(results["record"], indent=1),
        environments=json.dumps(results["environments"], indent=1),
        offline=OFFLINE,
    )
    file.write_text(page, encoding="utf-8")
    return file
