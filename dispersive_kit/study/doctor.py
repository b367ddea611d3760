"""Is this machine ready?"""

import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement

from dispersive_kit.data import data_folder
from dispersive_kit.data.files import free_bytes
from dispersive_kit.study.notebook import runs_folder

_MEMORY_GIB, _DISK_GIB = 3.0, 1.0
_DOWNLOADED = {"mnist": ("mnist.npz", "MNIST/raw/*"), "cifar10": ("cifar10.npz", "cifar-10-batches-py/*")}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `fix` says what to do when it is not `ok`."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at packages, kernel, device, memory, folders and data; takes a few seconds and changes nothing."""
    here = ["digits", *(name for name, places in _DOWNLOADED.items() if any(map(_holds_any, places)))]
    return [
        _packages(),
        _kernel(),
        _device(),
        _memory(),
        _writable("runs folder", runs_folder(), "DISPERSIVE_KIT_RUNS"),
        _writable("data folder", data_folder(), "DISPERSIVE_KIT_DATA"),
        Finding("data sets", True, f"{', '.join(here)} here; others are downloaded when first asked for"),
    ]


def _holds_any(place: str) -> bool:
    """A folder alone is no data: a download that failed leaves one."""
    return any(data_folder().glob(place))


def _packages() -> Finding:
    """Python and all that pyproject.toml asks for, notebooks included."""
    fix = "pip install 'dispersive-kit[notebooks]', or from a checkout: pip install -e '.[notebooks]'"
    try:
        wanted = map(Requirement, importlib.metadata.requires("dispersive-kit") or [])
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", False, "dispersive-kit itself is not installed", fix)
    needed = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": "notebooks"})]
    faults = [fault for requirement in needed if (fault := _shortfall(requirement))]
    detail = f"Python {sys.version.split()[0]}, PyTorch {torch.__version__} and all {len(needed)} that the kit needs"
    return Finding("packages", not faults, "; ".join(faults) or detail, fix)


def _shortfall(requirement: Requirement) -> str:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name}{requirement.specifier} wanted, found {version}"


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
        gpus = range(torch.cuda.device_count())
        free = [torch.cuda.mem_get_info(i)[0] / 2**30 for i in gpus]
        return Finding(
            "device", True, ", ".join(f"{torch.cuda.get_device_name(i)}, {free[i]:.0f} GiB free" for i in gpus)
        )
    cpu = f"CPU, {torch.get_num_threads()} threads (enough for class mode)"
    if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES", "all"):
        detail = f"{cpu}; there is an NVIDIA driver, but PyTorch {torch.__version__} sees no GPU"
        fix = "install the PyTorch build for this driver (pytorch.org, Get started), or update the driver"
        return Finding("device", False, detail, fix)
    return Finding("device", True, cpu)


def _memory() -> Finding:
    try:
        text = Path("/proc/meminfo").read_text()  # Linux; what could be had, the page cache included
        gib = int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) / 2**20  # type: ignore[index]
    except (OSError, TypeError):
        return Finding("memory", True, "this system does not tell")
    fix = f"close other programs: a notebook in class mode may take {_MEMORY_GIB:g} GiB"
    return Finding("memory", gib >= _MEMORY_GIB, f"{gib:.1f} GiB available", fix)


def _writable(name: str, folder: Path, variable: str) -> Finding:
    fix = f"make {folder} writable, free some disk, or set {variable} to another folder"
    try:
        with tempfile.TemporaryFile(dir=next(p for p in (folder, *folder.parents) if p.exists())):
            free = free_bytes(folder) / 2**30
    except OSError as error:
        return Finding(name, False, f"{folder}: {error.strerror}", fix)
    return Finding(name, free >= _DISK_GIB, f"{folder}, {free:.0f} GiB free", fix)
