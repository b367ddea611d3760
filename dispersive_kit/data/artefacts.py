"""The small files that the package ships beside its code, each held against its sha256 before it is read.

`artefacts/SHA256SUMS` lists them in the form of `sha256sum -c`.
"""

from functools import cache
from pathlib import Path

from dispersive_kit.data.files import file_sha256, write_whole
from dispersive_kit.errors import DataError

FOLDER = Path(__file__).resolve().parents[1] / "artefacts"
SUMS = "SHA256SUMS"
CURE = "install the package again, or make the file anew with `dispersive-kit artefacts build`"


def artefact(name: str, folder: Path = FOLDER) -> Path:
    """A shipped file, or a shipped folder all of whose files are sound.

    Raises:
        DataError: it is not listed, missing, or not the file that was listed.
    """
    names = [one for one in _listed(folder) if one == name or one.startswith(f"{name}/")]
    if not names:
        raise DataError(f"no artefact {name!r} is listed in {folder / SUMS}")
    if bad := [fault for one in names if (fault := _fault(folder, one))]:
        raise DataError(f"{'; '.join(bad)}: {CURE}")
    return folder / name


def faults(folder: Path = FOLDER) -> list[str]:
    """What is wrong with the shipped files, in words: changed, missing, or there without being listed."""
    names = _listed(folder)
    found = [fault for name in names if (fault := _fault(folder, name))]
    return found + [f"{folder / name} is not listed in {SUMS}" for name in sorted(set(_present(folder)) - set(names))]


def seal(folder: Path = FOLDER) -> int:
    """List every file that is there with its sha256, and say how many bytes they have."""
    names = _present(folder)
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in names]
    write_whole(folder / SUMS, "".join(lines).encode())
    return sum((folder / name).stat().st_size for name in names)


def _present(folder: Path) -> list[str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != SUMS)
    return sorted(file.relative_to(folder).as_posix() for file in files)


def _listed(folder: Path) -> dict[str, str]:
    """name -> sha256."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{folder / SUMS} is missing: {CURE}") from error
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _fault(folder: Path, name: str) -> str:
    file = folder / name
    if not file.is_file():
        return f"{file} is missing"
    stat = file.stat()
    same = _sha256(file, stat.st_mtime_ns, stat.st_size) == _listed(folder)[name]
    return "" if same else f"{file} is not the file that {SUMS} lists"


@cache
def _sha256(file: Path, _changed: int, _size: int) -> str:
    """Of a file as it is, read once."""
    return file_sha256(file)
