"""The machine: what it is, whether it is ready, a pool of processes on it, and the cluster that it belongs to."""

import contextlib
import functools
import hashlib
import importlib.metadata
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from packaging.requirements import Requirement

from dispersive_kit.data import data_folder
from dispersive_kit.data.files import free_bytes, versions
from dispersive_kit.errors import ConfigError, KitError
from dispersive_kit.study.notebook import PACKAGE, runs_folder

T = TypeVar("T")
R = TypeVar("R")
_REQUEST = {"timeout_min": 24 * 60, "gpus_per_node": 1, "cpus_per_task": 8, "tasks_per_node": 1, "nodes": 1}
_POLL_S = 0.5
_MEMORY_GIB, _DISK_GIB = 3.0, 1.0
_DOWNLOADED = {"mnist": ("mnist.npz", "MNIST/raw/*"), "cifar10": ("cifar10.npz", "cifar-10-batches-py/*")}


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


class _Finding(NamedTuple):
    """One thing looked at. `fix` says what to do when it is not `ok`."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def examine() -> list[_Finding]:
    """Look at packages, kernel, device, memory, folders and data; takes a few seconds and changes nothing."""
    checks: dict[str, Callable[[], tuple[bool, str, str]]] = {
        "packages": _packages,
        "home folder": lambda: (True, str(require_home()), ""),
        "notebook kernel": _kernel,
        "device": _device,
        "memory": _memory,
        "runs folder": lambda: _writable(runs_folder(), "DISPERSIVE_KIT_RUNS"),
        "data folder": lambda: _writable(data_folder(), "DISPERSIVE_KIT_DATA"),
        "data sets": _data_sets,
    }
    findings = []
    for name, check in checks.items():
        try:
            findings.append(_Finding(name, *check()))
        except Exception as error:  # whatever is wrong with a machine, the other checks are still made
            said = str(error) if isinstance(error, KitError) else f"{type(error).__name__}: {error}"
            findings.append(_Finding(name, False, said, "put right what the error names, then run doctor again"))
    return findings


def require_home() -> Path:
    """The home folder, where Jupyter keeps its files.

    Raises:
        ConfigError: there is none, as for a user id that the system does not know.
    """
    try:
        return Path.home()
    except RuntimeError as error:  # of Path.home and its like, for a user id without a home
        raise ConfigError(
            f"Jupyter keeps its files in a home folder ({error}): set HOME, as in HOME=/tmp/me"
        ) from error


def _packages() -> tuple[bool, str, str]:
    """Python and all that pyproject.toml asks for, notebooks included."""
    wanted = map(Requirement, importlib.metadata.requires("dispersive-kit") or [])
    needed = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": "notebooks"})]
    faults = []
    for one in needed:
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            faults.append(f"{one.name} is missing")
            continue
        if not one.specifier.contains(version, prereleases=True):
            faults.append(f"{one.name}{one.specifier} wanted, found {version}")
    detail = f"Python {sys.version.split()[0]}, PyTorch {torch.__version__} and all {len(needed)} that the kit needs"
    fix = "pip install 'dispersive-kit[notebooks]', or from a checkout: pip install -e '.[notebooks]'"
    return not faults, "; ".join(faults) or detail, fix


def _kernel() -> tuple[bool, str, str]:
    """The kernel that runs the notebooks must be of this Python: another one has other packages."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    fix = f"{sys.executable} -m ipykernel install --sys-prefix --name python3"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        return False, "no kernel named python3", fix
    program = spec.argv[0]
    # A bare "python" is replaced by this interpreter when the kernel is started.
    own = Path(program).name == program or Path(program).absolute() == Path(sys.executable).absolute()
    return own, f"python3 is {sys.executable if own else program}", f"{fix}, or remove {spec.resource_dir}"


def _device() -> tuple[bool, str, str]:
    if gpus := range(torch.cuda.device_count()):
        free = [torch.cuda.mem_get_info(i)[0] / 2**30 for i in gpus]
        return True, ", ".join(f"{torch.cuda.get_device_name(i)}, {free[i]:.0f} GiB free" for i in gpus), ""
    blind = shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    cpu = f"CPU, {torch.get_num_threads()} threads (enough for class mode)"
    detail = f"{cpu}; there is an NVIDIA driver, but PyTorch {torch.__version__} sees no GPU" if blind else cpu
    return not blind, detail, "install the PyTorch build for this driver (pytorch.org, Get started), or update it"


def _memory() -> tuple[bool, str, str]:
    try:
        text = Path("/proc/meminfo").read_text()  # Linux; what could be had, the page cache included
    except FileNotFoundError:
        return True, "this system does not tell", ""
    gib = int(re.findall(r"MemAvailable:\s+(\d+) kB", text)[0]) / 2**20
    fix = f"close other programs: a notebook in class mode may take {_MEMORY_GIB:g} GiB"
    return gib >= _MEMORY_GIB, f"{gib:.1f} GiB available", fix


def _writable(folder: Path, variable: str) -> tuple[bool, str, str]:
    fix = f"make {folder} writable, free some disk, or set {variable} to another folder"
    try:
        with tempfile.TemporaryFile(dir=next(p for p in (folder, *folder.parents) if p.exists())):
            free = free_bytes(folder) / 2**30
    except OSError as error:
        return False, f"{folder}: {error.strerror}", fix
    return free >= _DISK_GIB, f"{folder}, {free:.0f} GiB free", fix


def _data_sets() -> tuple[bool, str, str]:
    """A folder alone is no data: a download that failed leaves one."""
    here = [name for name, places in _DOWNLOADED.items() if any(any(data_folder().glob(p)) for p in places)]
    return True, f"{', '.join(['digits', *here])} here; others are downloaded when first asked for", ""


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
