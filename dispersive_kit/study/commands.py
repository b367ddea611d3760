"""What the command line's `run`, `demo` and `runs` do."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dispersive_kit.errors import ConfigError, KitError
from dispersive_kit.study.estimates import estimate
from dispersive_kit.study.execute import StageResult, run_notebook
from dispersive_kit.study.lookup import check_parameters, find_notebook, folder_within, parse_parameters
from dispersive_kit.study.notebook import runs_folder
from dispersive_kit.study.pipeline import (
    Executor,
    Pipeline,
    load_pipeline,
    plan,
    require_new,
    run_pipeline,
    shipped_pipelines,
)
from dispersive_kit.study.registry import as_table, find_runs, list_runs
from dispersive_kit.study.report import aggregated_numbers, measured_numbers, write_report
from dispersive_kit.study.sweep import Task, worker_count


def run(
    name: str,
    out: Path | None,
    *,
    mode: str | None,
    parameters: tuple[str, ...] = (),
    resume: bool = False,
    executor: Executor | None = None,
) -> None:
    """Run a notebook, a shipped pipeline or a pipeline's YAML file, and write the report.

    Raises:
        ConfigError: something is unknown or of the wrong form; nothing was run. KitError: a run failed.
    """
    if name in shipped_pipelines() or Path(name).suffix in (".yaml", ".yml"):
        if parameters:
            raise ConfigError("parameters go to a notebook; a pipeline has its own")
        _run_pipeline(load_pipeline(name), out, mode, resume=resume, executor=executor or Executor())
    else:
        if executor and executor != Executor():
            raise ConfigError("a notebook runs here, alone: --executor and --workers are for pipelines")
        _run_notebook(name, out, mode or "class", parameters, resume=resume)


def _run_notebook(name: str, out: Path | None, mode: str, texts: tuple[str, ...], *, resume: bool) -> None:
    notebook = find_notebook(name)
    parameters = {"mode": mode, **parse_parameters(notebook, texts)}
    check_parameters(notebook, parameters)
    folder = out or folder_within(runs_folder(), notebook.stem)
    require_new(folder, resume=resume)
    print(estimate([[Task(notebook.stem, notebook, parameters)]]), flush=True)
    result = run_notebook(str(notebook), folder, parameters)
    print(f"{result.name}: {result.status} in {result.seconds:.0f} s; {folder / 'notebook.ipynb'}")
    _conclude([result], folder, title=notebook.stem, subtitle=f"dispersive-kit run {name}, {parameters['mode']} mode")


def _run_pipeline(pipeline: Pipeline, out: Path | None, mode: str | None, *, resume: bool, executor: Executor) -> None:
    mode, out = mode or pipeline.mode, out or folder_within(runs_folder(), pipeline.name)
    tasks = plan(pipeline.stages, out, mode=mode, beside=pipeline.folder)
    require_new(out, resume=resume)
    print(estimate(tasks, worker_count(executor)), flush=True)
    total, results = sum(map(len, tasks)), []
    for result in run_pipeline(
        pipeline.stages, out, mode=mode, resume=True, beside=pipeline.folder, executor=executor.asking(pipeline.cluster)
    ):
        results.append(result)
        print(f"[{len(results)}/{total}] {result.name}: {result.status} ({result.seconds:.0f} s)", flush=True)
    subtitle = f"dispersive-kit run {pipeline.name}, {mode} mode: {len(results)} of {total} runs"
    _conclude(results, out, title=pipeline.title, subtitle=subtitle)


def _conclude(results: Sequence[StageResult], out: Path, *, title: str, subtitle: str) -> None:
    page = write_report(results, out, title=title, subtitle=subtitle)
    for result in results:
        if "/" not in result.name:
            _print_numbers(measured_numbers(result.folder))
    for stage in sorted({result.name.partition("/")[0] for result in results if "/" in result.name}):
        _print_numbers(aggregated_numbers(out / stage))
    print(f"\nreport: {page}")
    failed = [result for result in results if result.status == "failed"]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise KitError(f"{failed[0].name} failed at {failed[0].error}; see {failed[0].folder}/log.txt{more}")


def _print_numbers(numbers: Iterable[dict[str, Any]]) -> None:
    rows = [(n["name"], f"{n['value']:.3f}", n["note"]) for n in numbers]
    if rows:
        width = max(len(name) for name, _, _ in rows)
        print("\n" + "\n".join(f"  {name:<{width}}  {value:>10}  {note}" for name, value, note in rows))


def show_runs() -> str:
    """A table of all runs in the runs folder."""
    found = find_runs(runs_folder())
    return as_table(list_runs(found)) if found else f"no runs in {runs_folder()}"
