"""The commands around notebooks, studies and a class: dispersive-kit run | runs | study | lab | console | doctor."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from dispersive_kit.errors import DataError, KitError, printable

Name = Annotated[str, tyro.conf.Positional]


def run(
    notebook: Name,
    out: Path | None = None,
    mode: Literal["smoke", "class", "full"] | None = None,
    param: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=("-p",))] = (),
    resume: bool = False,
    executor: Literal["pool", "slurm", "local"] | None = None,
    workers: int | None = None,
) -> None:
    """Run one notebook ("06", or a path) or a pipeline ("demo", or a YAML file) headlessly, and write a report.

    `run demo` is the main job: it trains a small DiT on digits without and with Dispersive Loss, samples both and
    measures them; about five minutes on two CPU cores, no download.

    Args:
        notebook: Start of a notebook's name, a path, the name of a shipped pipeline, or the path of its YAML file.
        out: Folder to write; runs/NAME if not given.
        mode: smoke (seconds), class (minutes on a laptop) or full (a GPU); a pipeline's own, or class, if not given.
        param: A parameter of the notebook as NAME=VALUE, e.g. -p seed=3; may be given several times.
        resume: Go on in a folder that holds this run already; what is unchanged is not run again.
        executor: Where a pipeline runs: processes here (pool), Slurm jobs, or a trial of such jobs here (local).
        workers: At most so many runs of a sweep at once; one per GPU if not given, and all of them on a cluster.
    """
    from dispersive_kit.study.run import run as run_headlessly

    run_headlessly(notebook, out, mode=mode, parameters=param, resume=resume, executor=executor, workers=workers)


def _list_runs() -> None:
    """List the runs of notebooks and pipelines in the runs folder ($DISPERSIVE_KIT_RUNS, else runs/)."""
    from dispersive_kit.study.report import runs_table

    print(runs_table())


def _export(run: Annotated[Path, tyro.conf.Positional], out: Path, step: int | None = None) -> None:
    """Write a run's averaged weights in half precision, with its curves and card: small enough to share.

    Args:
        run: Folder of a trained run.
        out: Folder to write; refused if it holds something already. sample and evaluate take it like a run.
        step: A kept checkpoint; the newest if not given.
    """
    from dispersive_kit.training import export_run

    print(f"exported: {export_run(run, out, step=step)}")


def _study_run(plan: Name, out: Path | None = None, workers: int = 1) -> None:
    """Run what is not done yet of a study; give the same command again after a stop or kill.

    Args:
        plan: Name of a shipped plan (1-noise-floor), or the path of a YAML file.
        out: Folder of the runs; runs/studies/NAME-HASH if not given.
        workers: Runs at once, each on one thread.
    """
    from dispersive_kit.study.experiment import conclude, run_study
    from dispersive_kit.study.plan import load_plan

    opened = load_plan(plan)
    folder = out or opened.folder
    total = len(opened.tuning_cells()) + len(opened.cells())
    print(printable(f"{opened.title}\nplan {opened.name}, sha256 {opened.sha256[:16]}; runs in {folder}"))
    print(f"{total} runs, {workers} at once; the plan states {opened.cpu_hours:g} CPU hours", flush=True)
    started, done, here = time.monotonic(), 0, 0
    for cell, result, skipped in run_study(opened, folder, workers=workers):
        done, here = done + 1, here + (not skipped)
        said = result["error"] or ", ".join(f"{name} {value:.4g}" for name, value in result["values"].items())
        how = "skipped, done before" if skipped else f"{result['cpu_seconds']:.0f} CPU s"
        left = f"; about {(time.monotonic() - started) / here * (total - done) / 60:.0f} min left" if here else ""
        print(f"[{done}/{total}] {cell.name}: {said} ({how}){left}", flush=True)
    conclude(opened, folder)
    _study_report(plan, folder)


def _study_report(plan: Name, out: Path | None = None) -> None:
    """Write the page of a study and print its verdicts: of the runs made here, else of the results that come along.

    Args:
        plan: Name of a shipped plan, or the path of a YAML file.
        out: Folder of the runs, as for run, which report.html is written into. If it is not given,
            runs/studies/NAME-HASH, or else the results that come with the kit.
    """
    from dispersive_kit.study.plan import load_plan
    from dispersive_kit.study.report import as_table, write_study_page
    from dispersive_kit.study.verdict import load_results, verdict_rows

    opened = load_plan(plan)
    results, folder = load_results(opened, out), out or opened.folder
    folder.mkdir(parents=True, exist_ok=True)
    page = write_study_page(opened, results, _study_figures(results, folder), folder / "report.html")
    used = results["cpu_hours"]["used"]
    print(f"\n{as_table(verdict_rows(results))}\n\n{len(results['runs'])} runs, {used} CPU hours; report: {page}")


def _study_figures(results: dict[str, Any], folder: Path) -> list[str]:
    """A slope graph for each measure that has a verdict, as HTML elements and as FOLDER/MEASURE.png."""
    from dispersive_kit.views.figures import figure_html, slope_graph, style

    style()
    elements = []
    for measure in dict.fromkeys(v["measure"] for v in results["verdicts"]):
        found = [v for v in results["verdicts"] if v["measure"] == measure]
        said = "; ".join(f"{v['arm']} in {v['condition']}: {math.exp(v['mean']):.2f} times, {v['word']}" for v in found)
        figure = slope_graph(results, measure)
        figure.savefig(folder / f"{measure.replace(' ', '-')}.png")
        alt = f"Slope graph of {measure} over arms, a line a seed; ratio to {results['reference']}: {said}."
        elements.append(figure_html(figure, alt=alt))
    return elements


def _study_list() -> None:
    """List the plans that come with the kit, and what they found."""
    from dispersive_kit.study.plan import load_plan, shipped_plans
    from dispersive_kit.study.report import as_table
    from dispersive_kit.study.verdict import load_results

    rows = [["plan", "runs", "CPU hours", "primary", "title"]]
    for opened in map(load_plan, shipped_plans()):
        try:
            word = load_results(opened)["verdicts"][0]["word"]
        except DataError:
            word = "not run"
        total = len(opened.tuning_cells()) + len(opened.cells())
        rows.append([opened.name, str(total), f"{opened.cpu_hours:g}", word, opened.title])
    print(as_table(rows))


def _study_table() -> None:
    """Print all verdicts of the shipped studies; a checkout keeps them in notebooks/studies/README.md."""
    from dispersive_kit.study.plan import studies_folder
    from dispersive_kit.study.verdict import evidence_page

    page, mark = studies_folder() / "README.md", "<!-- below here: dispersive-kit study table -->\n\n"
    print(evidence_page())
    if page.is_file():  # in a checkout; an installed kit has no such page
        page.write_text(page.read_text("utf-8").partition(mark)[0] + mark + evidence_page(), "utf-8")
        print(f"written: {page}")


def lab(port: int = 8888, browser: bool = True) -> None:
    """Open the notebooks in JupyterLab: on this machine alone, with a token.

    Args:
        port: The port to listen on.
        browser: Open a browser; otherwise the address is printed.
    """
    from dispersive_kit.study.lab import serve_lab

    serve_lab(port, browser=browser)


def console(out: Path | None = None, port: int = 8889, browser: bool = True) -> None:
    """Open all demos in large type for a lecture: in Voila, on this machine alone, or as one HTML file.

    Args:
        out: Write the console as one file that needs neither Python nor a network, instead of serving it.
        port: The port to listen on.
        browser: Open a browser; otherwise the address is printed.
    """
    if out is not None:
        from dispersive_kit.views.console import write_console

        print(f"{out}: {write_console(out) / 1e6:.1f} MB, open it in any browser")
        return
    from dispersive_kit.study.lab import CONSOLE, serve_lab

    serve_lab(port, browser=browser, page=CONSOLE)


def doctor() -> None:
    """Look at versions, devices, memory, folders and data, and say what to do about each fault."""
    from dispersive_kit.study.machine import examine

    findings = examine()
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name:<20} {finding.detail}")
        if not finding.ok:
            print(f"      fix: {finding.fix}")
    if faults := sum(not f.ok for f in findings):
        raise KitError(f"{faults} of {len(findings)} need attention")


def _tasks(doc: str, **tasks: Callable[..., None]) -> Callable[..., None]:
    """One command of several tasks, such as `study run` and `study report`."""
    choices = [
        Annotated[Any, tyro.conf.subcommand(name, constructor=f, prefix_name=False)] for name, f in tasks.items()
    ]

    def command(task: Any) -> None: ...

    command.__doc__, command.__annotations__["task"] = doc, Annotated[Union[*choices], tyro.conf.OmitArgPrefixes]
    return command


STUDY_COMMANDS: dict[str, Callable[..., Any]] = {
    "run": run,
    "runs": _tasks(
        "List the runs of notebooks and pipelines, or export one of a training.", list=_list_runs, export=_export
    ),
    "study": _tasks(
        "Run a pre-registered study, report one, list those that come with the kit, or show all their verdicts.",
        run=_study_run,
        report=_study_report,
        list=_study_list,
        table=_study_table,
    ),
    "lab": lab,
    "console": console,
    "doctor": doctor,
}
