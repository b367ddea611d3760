"""What a run's numbers may depend on: the state of the code, versions, the device."""

import hashlib
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from dispersive_kit.data.files import versions
from dispersive_kit.study.lookup import PACKAGE

NO_INPUT = (".pyc", ".ipynb", ".yaml", ".j2", ".typed")  # files of the package that no run reads
SOURCES = (".py", ".ipynb", ".yaml")  # untracked files that count as changes


def describe_environment() -> dict[str, Any]:
    """Commit and hash of the uncommitted changes (None outside a checkout), hash of the package, versions, device."""
    return {
        **_code_state(),
        "package_sha256": package_hash(),
        "versions": versions(),
        "platform": platform.platform(),
        "host": platform.node(),
        "device": device_name(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def device_name() -> str:
    """The GPUs that torch sees, else the processor."""
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"


def package_hash() -> str:
    """sha256 over the files of the package that a number may depend on: its code, and artefacts that it ships."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*")):
        if file.is_file() and file.suffix not in NO_INPUT and file.name != "estimates.json":
            digest.update(file.read_bytes())
    return digest.hexdigest()


def peak_memory_gib() -> float | None:
    """The most memory this process has held so far; None where the system does not tell."""
    try:
        # Not getrusage: its ru_maxrss is inherited from the process that started this one.
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    kib = re.search(r"VmHWM:\s+(\d+) kB", status)
    return round(int(kib[1]) / 2**20, 2) if kib else None


def _code_state() -> dict[str, str | None]:
    root = PACKAGE.parent
    commit = _git("rev-parse", "HEAD") if (root / ".git").exists() else None
    if commit is None:
        return {"commit": None, "diff_sha256": None}
    changes = _git("diff", "HEAD", "--binary") or b""
    for name in sorted((_git("ls-files", "--others", "--exclude-standard", "-z") or b"").split(b"\0")):
        if Path(os.fsdecode(name)).suffix in SOURCES:
            changes += name + b"\0" + (root / os.fsdecode(name)).read_bytes()
    diff = hashlib.sha256(changes).hexdigest() if changes else None
    return {"commit": commit.decode().strip(), "diff_sha256": diff}


def _git(*words: str) -> bytes | None:
    try:
        return subprocess.run(["git", "-C", str(PACKAGE.parent), *words], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout that it trusts
        return None
