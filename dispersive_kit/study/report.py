"""Tables for a terminal, and HTML pages: each is one file that loads nothing and runs no script."""

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import Environment, FileSystemLoader
from pydantic import BaseModel, Field

from dispersive_kit.errors import DataError, printable
from dispersive_kit.study.notebook import Number, read_form, read_notebook, read_result
from dispersive_kit.study.plan import Plan
from dispersive_kit.study.verdict import WORDS, verdict_rows

_NUMBERS = ("measured", "value", "95 % interval", "floor", "")
_FORMULA = re.compile(r"(<(pre|code|style)\b.*?</\2>|<[^>]*>)|\$\$(.+?)\$\$|\$([^$]+)\$", re.DOTALL)
_PAGES = Environment(loader=FileSystemLoader(Path(__file__).with_name("pages")), autoescape=True)
_WORDS = {
    "cfg_scale": "guidance scale", "num_steps": "steps of the sampler", "n_reference": "real images compared with",
    "uint8_rule": "rounding", "held_out": "held-out loss", "frechet": "Fréchet distance", "heun": "Heun",
    "ema": "running average", "euler_maruyama": "Euler-Maruyama", "sde": "Euler-Maruyama", "dim": "features",
    "gap": "loss above its floor", "feature_rms": "root mean square of the features", "dispersive": "Dispersive Loss",
    "pooled_rank": "effective rank of pooled features", "sd_log": "deviation of the logarithm over seeds",
}  # fmt: skip


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
    """The run in `folder`, if there is one. Raises DataError: its stage.json is damaged."""
    if not (file := folder / "stage.json").is_file():
        return None
    return read_form(file, NotebookTask, str(file), DataError, folder=folder)


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text in columns, without control characters."""
    cells = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def _worded(value: Any) -> Any:
    """Nested names and values in the words of the field."""
    if isinstance(value, dict):
        return {_WORDS.get(name, str(name).replace("_", " ")): _worded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_worded(one) for one in value]
    return _WORDS.get(value, value) if isinstance(value, str) else value


_PAGES.filters["described"] = lambda value: yaml.safe_dump(_worded(value), sort_keys=False, allow_unicode=True)


def _write_page(file: Path, template: str, **content: Any) -> Path:
    """Write a page from pages/TEMPLATE.html.j2; text in it is text, not HTML. Returns `file`."""
    file.write_text(_PAGES.get_template(f"{template}.html.j2").render(content), encoding="utf-8")
    return file


def with_formulas(page: str) -> str:
    """HTML with the formulas between dollar signs as MathML, which a browser shows; tags and code are unchanged."""
    from latex2mathml.converter import convert

    def shown(found: re.Match[str]) -> str:
        try:
            return found[1] or convert(html.unescape(found[3] or found[4]), display="block" if found[3] else "inline")
        except Exception as error:  # latex2mathml's errors have no class in common
            return f"{found[0]} ({html.escape(repr(error))})"

    return _FORMULA.sub(shown, page)


def write_notebook_page(notebook: Path, source: Path) -> None:
    """Write NOTEBOOK.html beside an executed notebook, if it is there, with the pictures that lie beside its source."""
    if not notebook.is_file():
        return
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor, TagRemovePreprocessor

    document, _ = CoalesceStreamsPreprocessor().preprocess(read_notebook(notebook), {})  # one box for a cell's prints
    document.metadata.pop("widgets", None)
    for cell in (cell for cell in document.cells if cell.cell_type == "code"):
        cell.outputs = [one for one in cell.outputs if one.get("text", "text").strip()]  # a progress bar leaves blanks
        for output in cell.outputs:
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)  # its figure is there too
    setup = TagRemovePreprocessor(enabled=True, remove_input_tags={"setup"})  # the code of installation and imports
    pages = HTMLExporter(template_name="basic", preprocessors=[setup], embed_images=True)
    body, _ = pages.from_notebook_node(document, {"metadata": {"path": str(source.parent)}})
    _write_page(notebook.with_suffix(".html"), "page", title=notebook.parent.name, body=with_formulas(body))


def write_report(tasks: Sequence[NotebookTask], out: Path, *, title: str, subtitle: str) -> tuple[Path, str]:
    """Write `out/report.html`, which begins with the last answer of a notebook; its path, and a table of numbers."""
    stages = [_stage(name, list(runs)) for name, runs in groupby(tasks, lambda run: run.name.partition("/")[0])]
    numbers = [(", ".join(filter(None, (row[0], point))), *row[1:])
               for stage in stages for point, rows in stage["points"].items() for row in rows[1:]]  # fmt: skip
    answers = [stage["result"] for stage in stages if stage["result"] and stage["result"].headline]
    content = {"title": title, "subtitle": subtitle, "stages": stages, "answer": answers[-1] if answers else None}
    found = tasks[0].environment if tasks else {}
    return _write_page(out / "report.html", "report", **content, found=found), as_table([_NUMBERS, *numbers])


def _stage(name: str, runs: list[NotebookTask]) -> dict[str, Any]:
    """What the report says of a stage: all results of a single run, or the means over seeds of several runs.

    Failed runs and runs in smoke mode are not in the means; each is named with the reason.
    """
    varied = [name for name in runs[0].parameters if len({repr(run.parameters.get(name)) for run in runs}) > 1]
    left_out, points = dict[str, str](), dict[str, dict[str, list[Number]]]()
    for run in runs:
        result = None if run.error else read_result(run.folder)
        if not result or (result.mode == "smoke" and len(runs) > 1):  # the mode it ran in, forced or not
            left_out[run.name] = run.error or "smoke mode"
            continue
        point = ", ".join(f"{name} = {run.parameters[name]}" for name in varied if name != "seed")
        for number in result.numbers:
            points.setdefault(point, {}).setdefault(number.name, []).append(number)
    tables = {point: [_NUMBERS, *(_row(*one) for one in numbers.items())] for point, numbers in points.items()}
    status = ", ".join(f"{n} {kind}" for kind, n in Counter(run.status for run in runs).items())
    stage = {"name": name, "title": name, "runs": runs, "status": status, "left_out": left_out, "points": tables}
    if len(runs) > 1 or not result:
        return {**stage, "result": None, "figures": []}
    cells = read_notebook(runs[0].folder / "notebook.ipynb").cells
    outputs = ("".join(o.get("data", {}).get("text/html", "")) for cell in cells for o in cell.get("outputs", []))
    figures = [figure for page in outputs for figure in re.findall("<figure.*?</figure>", page, re.DOTALL)]
    title = re.match("# (.+)", cells[0].source)
    stage |= {"title": title[1] if title and name == runs[0].notebook.stem else name, "status": runs[0].status}
    return {**stage, "result": result, "figures": figures}


def _row(name: str, numbers: Sequence[Number]) -> tuple[str, ...]:
    """One number with its interval and floor; several as their mean, with the 95 % t-interval."""
    from scipy import stats

    values = [number.value for number in numbers]
    mean, record, note = sum(values) / len(values), numbers[0].record or {}, numbers[0].note
    if len({*values}) > 1:  # what is equal in all of them does not depend on the seed: its own record holds
        low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
        record, note = {"low": low, "high": high}, f"mean of {len(values)}"
    interval = f"{record['low']:.2f} to {record['high']:.2f}" if record.get("low") is not None else ""
    return name, f"{mean:.3g}", interval, f"{record['floor']:.2f}" if "floor" in record else "", note


def write_study_page(plan: Plan, results: Mapping[str, Any], figures: Sequence[str], file: Path) -> Path:
    """Write the page of a study; figures are HTML. Returns `file`."""
    settings = {name: ", ".join(f"{key} {value}" for key, value in _worded(one).items())
                for name, one in plan.conditions.items()}  # fmt: skip
    head, *rows = verdict_rows(results)
    rows = [(*row[:2], settings[row[2]] or row[2], *row[3:]) for row in rows]
    summary = [{**row, "condition": settings[row["condition"]] or row["condition"]} for row in results["summary"]]
    text, words = plan.file.read_text(encoding="utf-8"), WORDS.replace("*", "")
    content = {"plan": plan, "text": text, "words": words, "figures": figures, "summary": summary}
    content |= {"results": results, "rows": [head, *rows], "first": dict(zip(head, rows[0], strict=True))}
    return _write_page(file, "study", title=results["title"], **content)
