"""The small files that the package ships beside its code, each held against its sha256 before it is read.

`artefacts/SHA256SUMS` lists them in the form of `sha256sum -c`.
"""

from functools import cache
from pathlib import Path

from dispersive_kit.data.files import atomic_write, file_sha256
from dispersive_kit.errors import DataError

FOLDER = Path(__file__).resolve().parents[1] / "artefacts"
SUMS = "SHA256SUMS"
CURE = "install the package again, or make the file anew with data/make_artefacts.py of a checkout"


def artefact(name: str, folder: Path = FOLDER) -> Path:
    """A shipped file, or a shipped folder all of whose files are sound.

    Raises:
        DataError: it is not listed, missing, or not the file that was listed.
    """
    listed = {one: digest for one, digest in _listed(folder).items() if one == name or one.startswith(f"{name}/")}
    if not listed:
        raise DataError(f"no artefact {name!r} is listed in {folder / SUMS}")
    if bad := _faults(folder, listed):
        raise DataError(f"{'; '.join(bad)}: {CURE}")
    return folder / name


def faults(folder: Path = FOLDER) -> list[str]:
    """What is wrong with the shipped files, in words: changed, missing, or there without being listed."""
    listed = _listed(folder)
    unlisted = sorted(set(_present(folder)) - set(listed))
    return _faults(folder, listed) + [f"{folder / name} is not listed in {SUMS}" for name in unlisted]


def seal(folder: Path = FOLDER) -> int:
    """List every file that is there with its sha256, and say how many bytes they have."""
    names = _present(folder)
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in names]
    with atomic_write(folder / SUMS) as partial:
        partial.write_text("".join(lines))
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


def _faults(folder: Path, listed: dict[str, str]) -> list[str]:
    found = []
    for name, digest in listed.items():
        file = folder / name
        if not file.is_file():
            found.append(f"{file} is missing")
        elif _sha256(file, file.stat().st_mtime_ns, file.stat().st_size) != digest:
            found.append(f"{file} is not the file that {SUMS} lists")
    return found


@cache
def _sha256(file: Path, _changed: int, _size: int) -> str:
    """Of a file as it is, read once."""
    return file_sha256(file)
