"""The commands around notebooks, studies and a class: dispersive-kit run | study | lab | console | doctor."""

import math
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dispersive_kit.errors import ConfigError, KitError, printable


def run(
    notebook: tyro.conf.Positional[str],
    out: Path | None = None,
    mode: Literal["smoke", "class", "full"] | None = None,
    param: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(aliases=("-p",))] = (),
    resume: bool = False,
    workers: int | None = None,
) -> None:
    """Run one notebook ("06", or a path) or a pipeline ("demo", or a YAML file) headlessly, and write a report.

    `run demo` is the main job: it trains a small DiT on digits without and with Dispersive Loss, samples both and
    measures them, in about three minutes on two CPU cores, without a download. Cluster jobs with the same command share
    a sweep: `sbatch --array=1-6 --gpus=1 --wrap "dispersive-kit run digits --out runs/digits --resume"`.

    Args:
        notebook: Start of a notebook's name, a path, the name of a shipped pipeline, or the path of a pipeline file.
        out: Folder to write. Default: runs/NAME.
        mode: smoke (seconds), class (minutes on a laptop) or full (a GPU). Default: that of the pipeline, else class.
        param: A parameter of the notebook as NAME=VALUE, e.g. -p seed=3; may be given several times.
        resume: Continue in the folder of an earlier run. Runs that ended well and are unchanged are skipped.
        workers: Largest number of runs of a sweep at the same time. Default: one per GPU, or one without a GPU.
    """
    from dispersive_kit.study.run import run as run_headlessly

    run_headlessly(notebook, out, mode=mode, parameters=param, resume=resume, workers=workers)


def export(run: tyro.conf.Positional[Path], out: Path, step: int | None = None) -> None:
    """Write a small copy of a run to share: its averaged weights in half precision, its curves and its card.

    Args:
        run: Folder of a trained run.
        out: Folder to write, new or empty. sample and evaluate read it like a run.
        step: Step of a kept checkpoint. Default: the newest.
    """
    from dispersive_kit.training import export_run

    print(f"exported: {export_run(run, out, step=step)}")


def study(
    task: tyro.conf.Positional[Literal["run", "report", "table"]],
    plan: tyro.conf.Positional[str] = "",
    out: Path | None = None,
    workers: int = 1,
) -> None:
    """Run a pre-registered study, write its report, or print all verdicts that come with the kit.

    run trains and measures what is not done yet; give the same command again after a stop or a kill. report writes a
    study's page and prints its verdicts, from the runs made here or else from the shipped results. table prints all
    shipped verdicts, and writes them into notebooks/studies/README.md of a checkout.

    Args:
        task: What to do, see above.
        plan: Name of a shipped plan (1-noise-floor), or the path of a YAML file.
        out: Folder of the runs and of report.html. Default: runs/studies/NAME-HASH.
        workers: Runs at the same time, each on one thread.
    """
    from dispersive_kit.study.plan import load_plan, shipped_plans, studies_folder
    from dispersive_kit.study.verdict import evidence_page

    if task == "table":
        page, mark = studies_folder() / "README.md", "<!-- below here: dispersive-kit study table -->\n\n"
        if page.is_file():  # in a checkout; an installed kit has no such page
            page.write_text(page.read_text("utf-8").partition(mark)[0] + mark + evidence_page(), "utf-8")
            print(f"written: {page}")
        print(evidence_page())
    elif not plan:
        raise ConfigError(f"study {task} needs a plan; shipped are: {', '.join(shipped_plans())}")
    else:
        opened = load_plan(plan)
        if task == "run":
            _run_study(opened, out or opened.folder, workers)
        _report_study(opened, out)


def _run_study(plan: Any, folder: Path, workers: int) -> None:
    from dispersive_kit.study.experiment import conclude, run_study

    if (old := folder / "results.json").is_file() and plan.sha256.encode() not in old.read_bytes():
        raise ConfigError(f"{old} is of another plan, or of this one before a change: name another folder with --out")
    total = len(plan.tuning_cells()) + len(plan.cells())
    print(printable(f"{plan.title}\nplan {plan.name}, sha256 {plan.sha256[:16]}; runs in {folder}"))
    print(f"{total} runs, {workers} at once; the plan states {plan.cpu_hours:g} CPU hours", flush=True)
    started, here = time.monotonic(), 0
    for done, (cell, result, skipped) in enumerate(run_study(plan, folder, workers=workers), 1):
        here += not skipped
        said = result["error"] or ", ".join(f"{name} {value:.4g}" for name, value in result["values"].items())
        how = "skipped, done before" if skipped else f"{result['cpu_seconds']:.0f} CPU s"
        left = f"; about {(time.monotonic() - started) / here * (total - done) / 60:.0f} min left" if here else ""
        print(f"[{done}/{total}] {cell.name}: {said} ({how}){left}", flush=True)
    conclude(plan, folder)


def _report_study(plan: Any, out: Path | None) -> None:
    from dispersive_kit.study.report import as_table, write_study_page
    from dispersive_kit.study.verdict import load_results, verdict_rows
    from dispersive_kit.views.figures import figure_html, slope_graph, style

    results, folder, figures = load_results(plan, out), out or plan.folder, []
    folder.mkdir(parents=True, exist_ok=True)
    style()
    for measure in dict.fromkeys(v["measure"] for v in results["verdicts"]):
        found = [v for v in results["verdicts"] if v["measure"] == measure]
        said = "; ".join(
            f"{v['arm']} to {v.get('against', results['reference'])} in {v['condition']}: "
            f"{math.exp(v['mean']):.2f} times, {v['word']}"
            for v in found
        )
        alt = f"Slope graph of {measure} over arms, one line for each seed; ratios: {said}."
        figures.append(figure_html(slope_graph(results, measure), alt=alt))
    page, used = write_study_page(plan, results, figures, folder / "report.html"), results["cpu_hours"]["used"]
    print(f"\n{as_table(verdict_rows(results))}\n\n{len(results['runs'])} runs, {used} CPU hours; report: {page}")


def lab(port: int = 8888, browser: bool = True) -> None:
    """Open the notebooks in JupyterLab. Only this machine can reach it, and only with the token.

    Args:
        port: The port to listen on.
        browser: Open a browser. Without it, only the address is printed.
    """
    from dispersive_kit.study.lab import serve_lab

    serve_lab(port, browser=browser)


def console(out: Path | None = None, port: int = 8889, browser: bool = True) -> None:
    """Open all demos in large type for a lecture: in Voila, for this machine only, or as one HTML file.

    Args:
        out: Instead of serving it, write the console as one file that needs neither Python nor a network.
        port: The port to listen on.
        browser: Open a browser. Without it, only the address is printed.
    """
    if out is None:
        from dispersive_kit.study.lab import CONSOLE, serve_lab

        serve_lab(port, browser=browser, page=CONSOLE)
    else:
        from dispersive_kit.views.console import write_console

        print(f"{out}: {write_console(out) / 1e6:.1f} MB, open it in any browser")


def doctor() -> None:
    """Check packages, device, memory and folders, and say how to repair each fault."""
    from dispersive_kit.study.machine import examine

    findings = examine()
    for name, fine, found in findings:
        print(f"{'ok  ' if fine else 'FAIL'}  {name:<12} {found}")
    if faults := sum(not fine for _, fine, _ in findings):
        raise KitError(f"{faults} of {len(findings)} checks failed: the lines that begin with FAIL say what to do")
