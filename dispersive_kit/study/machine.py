"""The machine: its description, checks of it, and a pool of processes on it."""

import contextlib
import functools
import hashlib
import importlib.metadata
import multiprocessing
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from packaging.requirements import Requirement

from dispersive_kit.data import data_folder
from dispersive_kit.data.files import free_bytes, versions
from dispersive_kit.errors import ConfigError, KitError
from dispersive_kit.study.notebook import PACKAGE, runs_folder

T = TypeVar("T")
R = TypeVar("R")
_MEMORY_GIB, _DISK_GIB = 3.0, 1.0


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


def examine() -> list[tuple[str, bool, str]]:
    """Each check (packages, device, memory, folders): name, whether it passed, what was found or how to repair it."""
    checks = {
        "packages": _packages,
        "home folder": require_home,
        "device": _device,
        "memory": _memory,
        "runs folder": lambda: _room(runs_folder(), "DISPERSIVE_KIT_RUNS"),
        "data folder": lambda: _room(data_folder(), "DISPERSIVE_KIT_DATA"),
    }
    findings = []
    for name, check in checks.items():
        try:
            findings.append((name, True, str(check())))
        except Exception as error:  # whatever is wrong with a machine, the other checks are still made
            said = str(error) if isinstance(error, KitError) else f"{type(error).__name__}: {error}"
            findings.append((name, False, said))
    return findings


def require_home() -> Path:
    """The home folder, where Jupyter keeps its files; ConfigError for a user id that has none."""
    try:
        return Path.home()
    except RuntimeError as error:  # Path.home raises it for a user id without a home
        raise ConfigError(f"Jupyter keeps files in a home folder ({error}): set HOME, as in HOME=/tmp/me") from error


def _packages() -> str:
    """Check the packages that pyproject.toml requires, with those for notebooks."""
    wanted = map(Requirement, importlib.metadata.requires("dispersive-kit") or [])
    needed = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": "notebooks"})]
    for one in needed:
        found = next((d.version for d in importlib.metadata.distributions(name=one.name)), "none")
        if found == "none" or not one.specifier.contains(found, prereleases=True):
            cure = "pip install 'dispersive-kit[notebooks]', or from a checkout: pip install -e '.[notebooks]'"
            raise KitError(f"{one.name}{one.specifier} wanted, found {found}: {cure}")
    return f"Python {platform.python_version()}, PyTorch {torch.__version__} and all {len(needed)} required packages"


def _device() -> str:
    if gpus := range(torch.cuda.device_count()):
        free = [torch.cuda.mem_get_info(i)[0] / 2**30 for i in gpus]
        return ", ".join(f"{torch.cuda.get_device_name(i)}, {free[i]:.0f} GiB free" for i in gpus)
    if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES", "all"):  # not hidden on purpose
        cure = "install the PyTorch build for this driver (pytorch.org, Get started), or update it"
        raise KitError(f"there is an NVIDIA driver, but PyTorch {torch.__version__} sees no GPU: {cure}")
    return f"CPU, {torch.get_num_threads()} threads (enough for class mode)"


def _memory() -> str:
    gib = psutil.virtual_memory().available / 2**30
    if gib < _MEMORY_GIB:
        raise KitError(f"{gib:.1f} GiB left, and a notebook in class mode may take {_MEMORY_GIB}: close other programs")
    return f"{gib:.1f} GiB available"


def _room(folder: Path, variable: str) -> str:
    """Check that `folder`, or the place where it will be made, is writable and has room."""
    cure = f"make {folder} writable, free some disk, or set {variable} to another folder"
    try:
        with tempfile.TemporaryFile(dir=next(p for p in (folder, *folder.parents) if p.exists())):
            free = free_bytes(folder) / 2**30
    except OSError as error:
        raise KitError(f"{folder}: {error.strerror}: {cure}") from error
    if free < _DISK_GIB:
        raise KitError(f"{folder} has {free:.1f} GiB free: {cure}")
    return f"{folder}, {free:.0f} GiB free"


def _visible_gpus() -> tuple[str, ...]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name for name in given.split(",") if name] or [str(i) for i in range(torch.cuda.device_count())]
    return tuple(names[: torch.cuda.device_count()])


def in_pool(call: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[tuple[T, Future[R]]]:
    """Run call(item) for each item in a pool of new processes; yields each item and its finished future, as they end.

    If there are GPUs, each worker keeps one. workers: by default one for each GPU, or one without a GPU. They end with
    this process, also when it is killed. If the caller stops early, running calls are finished and no others start.
    Raises ConfigError: fewer than one worker, or more workers than GPUs.
    """
    gpus = _visible_gpus()
    workers = len(gpus) or 1 if workers is None else workers
    if workers < 1:
        raise ConfigError(f"{workers} workers cannot run anything: --workers takes 1 or more")
    if gpus and workers > len(gpus):
        raise ConfigError(f"{workers} workers for {len(gpus)} GPUs: each worker needs one of its own")
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    free = spawn.SimpleQueue()
    for gpu in gpus[:workers] or [""] * workers:
        free.put(gpu)
    waiting, running = iter(items), dict[Future[R], T]()
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(free,)) as pool:
        while True:
            for item in islice(waiting, workers - len(running)):
                try:
                    future = pool.submit(call, item)
                except BrokenExecutor as error:  # a worker was killed, and the others with it
                    future = Future()
                    future.set_exception(error)
                running[future] = item
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future


def _start_worker(free_gpus: Any) -> None:
    if gpu := free_gpus.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    parent: Any = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
