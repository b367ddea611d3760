"""The runs of one stage: one after another, in a pool of processes or on a cluster; and what they say together."""

import itertools
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from dispersive_kit.data.files import write_json
from dispersive_kit.errors import ConfigError, KitError
from dispersive_kit.study.execute import StageResult, ended_well, input_hash, read_stage, run_notebook
from dispersive_kit.study.schema import read_result

T = TypeVar("T")
R = TypeVar("R")
POLL_S = 0.5
REQUEST = {"timeout_min": 24 * 60, "gpus_per_node": 1, "cpus_per_task": 8, "tasks_per_node": 1, "nodes": 1}


@dataclass(frozen=True)
class Task:
    """One run: its name is its folder below that of the pipeline."""

    name: str
    notebook: Path
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Executor:
    """Where runs are executed: in a pool of processes here, or by submitit on Slurm ("local" is its trial run here).

    workers: at most so many at once; None: one per GPU, or one, in a pool, and all on a cluster.
    gpus: one for each worker of a pool, as CUDA_VISIBLE_DEVICES. request: what submitit asks of the cluster for a run.

    Raises:
        ConfigError: less than one worker.
    """

    kind: Literal["pool", "slurm", "local"] = "pool"
    workers: int | None = None
    gpus: tuple[str, ...] | None = None
    request: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"{self.workers} workers cannot run anything: --workers takes 1 or more")

    def asking(self, request: dict[str, Any]) -> "Executor":
        """The same executor with another request."""
        return replace(self, request=request)


def expand(grid: dict[str, list[Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The points of a grid, each with a name like "seed=0,tau=0.5" that can be a folder; one nameless without a grid.

    Raises:
        ConfigError: two points would have the same name.
    """
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    names = [re.sub(r"[^\w.=,+-]", "-", ",".join(f"{k}={v}" for k, v in p.items()), flags=re.ASCII) for p in points]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two points of the grid would share the folder {sorted(twice)[0]!r}")
    return list(zip(names, points, strict=True))


def run_task(task: Task, out: Path) -> StageResult:
    """Run one task below `out`; skipped if it has ended well there before."""
    return run_notebook(str(task.notebook), out / task.name, task.parameters, label=task.name)


def run_tasks(tasks: Sequence[Task], out: Path, executor: Executor) -> Iterator[StageResult]:
    """Run all tasks, and yield each result as it ends.

    Raises:
        ConfigError: more workers than GPUs, or a request that submitit does not understand.
    """
    if executor.kind != "pool":
        yield from _on_cluster(tasks, out, executor)
        return
    gpus = visible_gpus() if executor.gpus is None else executor.gpus
    workers = min(worker_count(executor), len(tasks))
    if workers == 1:
        yield from (run_task(task, out) for task in tasks)
    else:
        yield from _in_pool(tasks, out, workers, gpus)


def worker_count(executor: Executor) -> int:
    """How many runs of one stage go on at once at most."""
    if executor.kind == "pool":
        gpus = visible_gpus() if executor.gpus is None else executor.gpus
        return executor.workers or len(gpus) or 1
    return executor.workers or 10**6


def visible_gpus() -> tuple[str, ...]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name for name in given.split(",") if name] or [str(i) for i in range(torch.cuda.device_count())]
    return tuple(names[: torch.cuda.device_count()])


def _in_pool(tasks: Sequence[Task], out: Path, workers: int, gpus: tuple[str, ...]) -> Iterator[StageResult]:
    for task, future in in_pool(partial(run_task, out=out), tasks, workers, gpus):
        yield _outcome(future, task, out)


def in_pool(
    call: Callable[[T], R], items: Iterable[T], workers: int, gpus: tuple[str, ...] = ()
) -> Iterator[tuple[T, Future[R]]]:
    """call(item) for each item in a pool of fresh processes; item and its finished future, as they end.

    A worker has one of `gpus` for good. The workers end with this process, also when it is killed. Where the caller
    stops early (Ctrl-C, a failed run), what runs now ends and nothing more begins.

    Raises:
        ConfigError: more workers than GPUs.
    """
    if gpus and workers > len(gpus):
        raise ConfigError(f"{workers} workers for {len(gpus)} GPUs: each worker needs one of its own")
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    free = spawn.SimpleQueue()
    for gpu in gpus[:workers]:
        free.put(gpu)
    stopped = spawn.Event()
    setup = (free if gpus else None, stopped)
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=setup) as pool:
        futures = {pool.submit(_unless_stopped, call, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future
        finally:
            stopped.set()  # and not future.cancel(): what a worker has been handed already would still run


_stopped: Any = None  # of a worker: set once nothing more is to begin


def _unless_stopped(call: Callable[[T], R], item: T) -> R:
    if _stopped.is_set():
        raise KitError("not begun: the runs were stopped")
    return call(item)


def _start_worker(free_gpus: Any, stopped: Any) -> None:
    """Take a GPU for good, and end with the process that started this one, also when that one is killed."""
    global _stopped
    _stopped = stopped
    if free_gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = free_gpus.get()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _outcome(future: Future[StageResult], task: Task, out: Path) -> StageResult:
    try:
        return future.result()
    except BrokenExecutor:
        error = "a worker process was killed (by the system, for memory?); --resume runs again what is not done"
        return StageResult(task.name, "failed", 0.0, out / task.name, error)


def _on_cluster(tasks: Sequence[Task], out: Path, executor: Executor) -> Iterator[StageResult]:
    """Submit each task as a job of its own.

    submitit hands the job over as a pickle of our own making in OUT/.submitit; results are read from stage.json.

    Raises:
        ConfigError: the request holds what submitit does not know, or a value of the wrong type.
    """
    import submitit

    submitter = submitit.AutoExecutor(folder=out / ".submitit", cluster=executor.kind)
    try:
        submitter.update_parameters(name=out.name, **{**REQUEST, **executor.request})
    except (NameError, AssertionError) as fault:
        raise ConfigError(f"cluster: {fault}") from fault
    waiting = [task for task in tasks if not ended_well(task.notebook, out / task.name, task.parameters)]
    yield from (StageResult(task.name, "skipped", 0.0, out / task.name) for task in tasks if task not in waiting)
    running: dict[str, tuple[Any, Task]] = {}
    while waiting or running:
        while waiting and len(running) < worker_count(executor):
            task = waiting.pop(0)
            job = submitter.submit(run_task, task, out.resolve())
            running[job.job_id] = job, task
        for job, task in [pair for pair in running.values() if pair[0].done()]:
            del running[job.job_id]
            yield _result_of(job, task, out)
        time.sleep(POLL_S)


def _result_of(job: Any, task: Task, out: Path) -> StageResult:
    stage = read_stage(out / task.name)
    if stage.get("key") == input_hash(task.notebook, task.parameters) and stage["status"] in ("ok", "failed"):
        return StageResult(task.name, stage["status"], stage["seconds"], out / task.name, stage["error"])
    last = (job.stderr() or "nothing on its stderr").strip().splitlines()[-1]
    error = f"job {job.job_id} ended without a result: {last}; see {job.paths.stderr}"
    return StageResult(task.name, "failed", 0.0, out / task.name, error)


def write_aggregate(tasks: Sequence[Task], grid: dict[str, list[Any]], out: Path) -> None:
    """Write STAGE/aggregate.json: mean and 95 % t-interval over seeds of every recorded number, per point of the grid.

    Failed runs and runs in smoke mode are left out, and named with the reason.
    """
    groups: dict[str, dict[str, Any]] = {}
    left_out = []
    for task in tasks:
        if why := _reason_to_leave_out(task, out):
            left_out.append({"run": task.name, "why": why})
            continue
        point = {name: task.parameters[name] for name in grid if name != "seed"}
        group = groups.setdefault(repr(point), {"point": point, "runs": [], "values": {}})
        group["runs"].append(task.name)
        for number in read_result(out / task.name)["numbers"]:
            group["values"].setdefault(number["name"], []).append(number["value"])
    for group in groups.values():
        group["numbers"] = [{"name": name, **_summary(v)} for name, v in group.pop("values").items()]
    file = out / Path(tasks[0].name).parent / "aggregate.json"
    write_json(file, {"groups": [*groups.values()], "left_out": left_out})


def _reason_to_leave_out(task: Task, out: Path) -> str:
    stage = read_stage(out / task.name)
    if stage.get("key") != input_hash(task.notebook, task.parameters):
        return "not run"
    if stage["status"] != "ok":
        return f"{stage['status']}: {stage.get('error', '')}"
    # The mode it ran in, which the environment may have forced, and not the one it was asked for.
    return "smoke mode" if read_result(out / task.name)["mode"] == "smoke" else ""


def _summary(values: list[float]) -> dict[str, Any]:
    from scipy import stats

    mean, n = sum(values) / len(values), len(values)
    if n == 1:
        return {"mean": mean, "n": n}
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}
