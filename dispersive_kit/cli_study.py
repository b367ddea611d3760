"""The commands around a pre-registered study: dispersive-kit study run | report | list | table."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from dispersive_kit.study.experiment import Ended
    from dispersive_kit.study.plan import Plan


def run(
    plan: Annotated[str, tyro.conf.Positional],
    out: Path | None = None,
    workers: int = 1,
    data_dir: str | None = None,
) -> None:
    """Run what is not done yet of a study; give the same command again after a stop or kill.

    Args:
        plan: Name of a shipped plan (1-noise-floor), or the path of a YAML file.
        out: Folder of the runs; runs/studies/NAME-HASH if not given.
        workers: Runs at once, each on one thread.
        data_dir: Folder in which mnist and cifar10 lie.
    """
    from dispersive_kit.study.experiment import run_study, study_folder
    from dispersive_kit.study.plan import load_plan
    from dispersive_kit.study.results import conclude

    opened = load_plan(plan)
    folder = out or study_folder(opened)
    total = len(opened.tuning_cells()) + len(opened.cells())
    print(f"{opened.title}\nplan {opened.name}, sha256 {opened.sha256[:16]}; runs in {folder}")
    print(f"{total} runs, {workers} at once; the plan states {opened.cpu_hours:g} CPU hours", flush=True)
    started, done, here = time.monotonic(), 0, 0
    for ended in run_study(opened, folder, workers=workers, data_dir=data_dir):
        done, here = done + 1, here + (not ended.skipped)
        left = (time.monotonic() - started) / here * (total - done) if here else None
        print(f"[{done}/{total}] {_line(ended)}{_eta(left)}", flush=True)
    _report(opened, conclude(opened, folder), folder)


def _line(ended: "Ended") -> str:
    result = ended.result
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in result["values"].items())
    how = "skipped, done before" if ended.skipped else f"{result['cpu_seconds']:.0f} CPU s"
    return f"{ended.cell.name}: {result['error'] or numbers} ({how})"


def _eta(seconds: float | None) -> str:
    return "" if seconds is None else f"; about {seconds / 60:.0f} min left"


def report(plan: Annotated[str, tyro.conf.Positional], out: Path | None = None) -> None:
    """Write the page of a study and print its verdicts: of the runs made here, else of the results that come along.

    Args:
        plan: Name of a shipped plan, or the path of a YAML file.
        out: Folder of the runs, as for run, which report.html is written into. If it is not given,
            runs/studies/NAME-HASH, or else the results that come with the kit.
    """
    from dispersive_kit.study.experiment import study_folder
    from dispersive_kit.study.plan import load_plan
    from dispersive_kit.study.results import load_results

    opened = load_plan(plan)
    _report(opened, load_results(opened, out), out or study_folder(opened))


def _report(plan: "Plan", results: dict[str, Any], folder: Path) -> None:
    from dispersive_kit.study.registry import as_table
    from dispersive_kit.study.study_report import verdict_rows, write_study_report

    folder.mkdir(parents=True, exist_ok=True)
    page = write_study_report(plan, results, draw_figures(results, folder), folder / "report.html")
    used = results["cpu_hours"]["used"]
    print(f"\n{as_table(verdict_rows(results))}\n\n{len(results['runs'])} runs, {used} CPU hours; report: {page}")


def draw_figures(results: dict[str, Any], folder: Path) -> list[str]:
    """A slope graph for each measure that has a verdict, as HTML elements and as FOLDER/MEASURE.png."""
    from dispersive_kit.views.plots import figure_html, style
    from dispersive_kit.views.study_plots import slope_graph

    style()
    elements = []
    for measure in dict.fromkeys(v["measure"] for v in results["verdicts"]):
        figure = slope_graph(results, measure)
        figure.savefig(folder / f"{measure.replace(' ', '-')}.png")
        elements.append(figure_html(figure, alt=slopes_in_words(results, measure)))
    return elements


def slopes_in_words(results: dict[str, Any], measure: str) -> str:
    """The alternative text of a slope graph: its verdicts."""
    found = [v for v in results["verdicts"] if v["measure"] == measure]
    said = [f"{v['arm']} in {v['condition']}: {math.exp(v['mean']):.2f} times, {v['word']}" for v in found]
    return f"Slope graph of {measure} over arms, a line a seed; ratio to {results['reference']}: {'; '.join(said)}."


def plans() -> None:
    """List the plans that come with the kit, and what they found."""
    from dispersive_kit.errors import DataError
    from dispersive_kit.study.plan import load_plan, shipped_plans
    from dispersive_kit.study.registry import as_table
    from dispersive_kit.study.results import load_results

    rows = [["plan", "runs", "CPU hours", "primary", "title"]]
    for opened in map(load_plan, shipped_plans()):
        try:
            word = load_results(opened)["verdicts"][0]["word"]
        except DataError:
            word = "not run"
        total = len(opened.tuning_cells()) + len(opened.cells())
        rows.append([opened.name, str(total), f"{opened.cpu_hours:g}", word, opened.title])
    print(as_table(rows))


def table(write: bool = False) -> None:
    """The verdicts of all studies that come with the kit, as the README has them.

    Args:
        write: Put them into the README of this checkout, and draw notebooks/figures/verdicts.png.
    """
    from dispersive_kit.errors import ConfigError
    from dispersive_kit.study.claims import readme_text
    from dispersive_kit.study.evidence import evidence_markdown, with_evidence
    from dispersive_kit.study.lookup import PACKAGE

    if not write:
        print(evidence_markdown())
        return
    readme = readme_text()
    if readme is None:
        raise ConfigError(f"{PACKAGE.parent} has no README.md to write into: --write is for a checkout")
    (PACKAGE.parent / "README.md").write_text(with_evidence(readme), encoding="utf-8")
    draw_evidence(PACKAGE.parent / "notebooks" / "figures" / "verdicts.png")


def draw_evidence(file: Path) -> None:
    """All verdicts as one picture, which carries the hash of the table that it belongs to."""
    from dispersive_kit.study.evidence import all_verdicts, evidence_hash
    from dispersive_kit.views.plots import style
    from dispersive_kit.views.study_plots import verdict_forest

    style()
    verdict_forest(all_verdicts()).savefig(file, metadata={"Description": evidence_hash()})


Run = Annotated[Any, tyro.conf.subcommand("run", constructor=run, prefix_name=False)]
Report = Annotated[Any, tyro.conf.subcommand("report", constructor=report, prefix_name=False)]
Plans = Annotated[Any, tyro.conf.subcommand("list", constructor=plans, prefix_name=False)]

Table = Annotated[Any, tyro.conf.subcommand("table", constructor=table, prefix_name=False)]


def study(task: tyro.conf.OmitArgPrefixes[Run | Report | Plans | Table]) -> None:
    """Run a pre-registered study, report one, list those that come with the kit, or tell all their verdicts."""
