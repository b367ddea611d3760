"""The machine: what it is, a pool of processes on it, and the cluster that it belongs to."""

import contextlib
import functools
import hashlib
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from dispersive_kit.data.files import versions
from dispersive_kit.errors import ConfigError
from dispersive_kit.study.notebook import PACKAGE

T = TypeVar("T")
R = TypeVar("R")
_REQUEST = {"timeout_min": 24 * 60, "gpus_per_node": 1, "cpus_per_task": 8, "tasks_per_node": 1, "nodes": 1}
_POLL_S = 0.5


def describe_environment() -> dict[str, Any]:
    """Commit ("-dirty" where files were changed since; None outside a checkout), package's hash, versions, device."""
    git = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    if (PACKAGE.parent / ".git").exists():  # and not a package installed somewhere inside another checkout
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or not a checkout that it trusts
            commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip() or None
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return {
        "commit": commit,
        "package_sha256": package_hash(),
        "versions": versions(),
        "platform": platform.platform(),
        "host": platform.node(),
        "device": gpus or f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


@functools.cache
def package_hash() -> str:
    """sha256 over the files of the package that a number may depend on: its code, and artefacts that it ships."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*")):
        if file.is_file() and file.suffix not in (".pyc", ".ipynb", ".yaml", ".j2", ".typed"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _visible_gpus() -> tuple[str, ...]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name for name in given.split(",") if name] or [str(i) for i in range(torch.cuda.device_count())]
    return tuple(names[: torch.cuda.device_count()])


def in_pool(call: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[tuple[T, Future[R]]]:
    """call(item) for each item in a pool of fresh processes; item and its finished future, as they end.

    A worker has a GPU for good, where there are some; workers: one for each GPU, or one, if not given. They end with
    this process, also when it is killed. Where the caller stops early, what runs now ends and nothing more begins.

    Raises:
        ConfigError: no worker, or more workers than GPUs.
    """
    gpus = _visible_gpus()
    workers = len(gpus) or 1 if workers is None else workers
    if workers < 1:
        raise ConfigError(f"{workers} workers cannot run anything: --workers takes 1 or more")
    if gpus and workers > len(gpus):
        raise ConfigError(f"{workers} workers for {len(gpus)} GPUs: each worker needs one of its own")
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    free = spawn.SimpleQueue()
    for gpu in gpus[:workers] or [None] * workers:
        free.put(gpu)
    waiting, running = iter(items), dict[Future[R], T]()
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(free,)) as pool:
        while True:
            for item in islice(waiting, workers - len(running)):
                running[_submit(pool, call, item)] = item
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future


def _submit(pool: ProcessPoolExecutor, call: Callable[[T], R], item: T) -> Future[R]:
    try:
        return pool.submit(call, item)
    except BrokenExecutor as fault:  # a worker was killed, and the others with it
        broken: Future[R] = Future()
        broken.set_exception(fault)
        return broken


def _start_worker(free_gpus: Any) -> None:
    if gpu := free_gpus.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    parent: Any = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def on_cluster(
    call: Callable[[T], Any], items: Iterable[T], workers: int | None, out: Path, cluster: str, request: dict[str, Any]
) -> Iterator[tuple[T, str]]:
    """call(item) for each item as a job of its own; item and the last words of its job, as they end.

    submitit hands a job over as a pickle of our own making in OUT/.submitit; what it gives back is not read.

    Raises:
        ConfigError: the request holds what submitit does not know, or a value of the wrong type.
    """
    import submitit

    submitter = submitit.AutoExecutor(folder=out / ".submitit", cluster=cluster)
    try:
        submitter.update_parameters(name=out.name, **{**_REQUEST, **request})
    except (NameError, AssertionError) as fault:
        raise ConfigError(f"cluster: {fault}") from fault
    waiting, running = iter(items), dict[Any, T]()
    while True:
        room = sys.maxsize if workers is None else workers - len(running)
        running |= {submitter.submit(call, item): item for item in islice(waiting, room)}
        if not running:
            return
        for job in [job for job in running if job.done()]:
            said = (job.stderr() or "nothing on its stderr").strip().splitlines()[-1]
            yield running.pop(job), f"job {job.job_id} ended without a result: {said}; see {job.paths.stderr}"
        time.sleep(_POLL_S)
