"""Notebooks and run folders by name, and parameters held against the notebook that will get them."""

import json
import re
from pathlib import Path
from typing import Any

from dispersive_kit.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*")
GIVEN_BY_THE_RUNNER = "out"


def notebooks_folder() -> Path:
    """The notebooks of a checkout, or those inside the installed package."""
    inside = PACKAGE / "notebooks"
    return inside if inside.is_dir() else PACKAGE.parent / "notebooks"


def find_notebook(name: str, beside: Path | None = None) -> Path:
    """A notebook by path (also one `beside` a pipeline's file), by name, or by the number its name starts with.

    Raises:
        ConfigError: there is none, or several begin so.
    """
    if Path(name).suffix == ".ipynb":
        places = [folder / name for folder in (beside, Path()) if folder is not None]
        if file := next((p for p in places if p.is_file()), None):
            return file
    known = sorted(notebooks_folder().glob("*.ipynb"))
    found = [p for p in known if p.stem == name] or [p for p in known if p.stem.startswith(name)]
    if not name or len(found) != 1:
        raise ConfigError(f"{name!r} names {len(found)} notebooks; there are: {', '.join(p.stem for p in known)}")
    return found[0]


def safe_name(name: str, what: str = "run name") -> str:
    """The name, if it is that of a single folder and cannot lead out of the one it lies in.

    Raises:
        ConfigError: it could.
    """
    if not SAFE_NAME.fullmatch(name):
        raise ConfigError(f"{what} {name!r}: use letters, digits and . _ = , + - only, not first a sign")
    return name


def folder_within(parent: Path, name: str) -> Path:
    """The folder `name`, of safe names with / between, below `parent`.

    Raises:
        ConfigError: it would lie elsewhere, by its name or by a symbolic link.
    """
    folder = parent.joinpath(*(safe_name(part) for part in name.split("/")))
    if not folder.resolve().is_relative_to(parent.resolve()):
        raise ConfigError(f"{folder} is a link out of {parent}")
    return folder


def declared_parameters(notebook: Path) -> dict[str, str]:
    """Name and declared type of each parameter a run may set."""
    import papermill

    known = papermill.inspect_notebook(str(notebook))
    return {name: one["inferred_type_name"] for name, one in known.items() if name != GIVEN_BY_THE_RUNNER}


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Refuse what papermill would only warn of, before a kernel starts.

    Raises:
        ConfigError: a parameter the notebook does not have, or a value of another type than the declared one.
    """
    declared = declared_parameters(notebook)
    for name, value in parameters.items():
        if name not in declared:
            raise ConfigError(_unknown(notebook, name, declared))
        if not _fits(declared[name], value):
            raise ConfigError(f"{notebook.stem}: {name} is {declared[name]}, got {value!r} ({type(value).__name__})")


def parse_parameters(notebook: Path, texts: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE as typed on a command line; VALUE is JSON (3, 0.5, true, [1, 2]) unless the notebook wants a str.

    Raises:
        ConfigError: a text of another form, or a parameter the notebook does not have.
    """
    declared, parameters = declared_parameters(notebook), {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} is not NAME=VALUE")
        if name not in declared:
            raise ConfigError(_unknown(notebook, name, declared))
        parameters[name] = value if declared[name] == "str" else _from_json(value)
    return parameters


def _unknown(notebook: Path, name: str, declared: dict[str, str]) -> str:
    if name == GIVEN_BY_THE_RUNNER:
        return f"{notebook.stem}: {name!r} is set by the run itself; choose its folder with --out"
    return f"{notebook.stem} has no parameter {name!r}; it has: {', '.join(declared)}"


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _fits(declared: str, value: Any) -> bool:
    """Whether a value is of a declared type: `int`, `float | None`, `list[str]`; an int will do for a float."""
    kinds = {part.strip().partition("[")[0] for part in declared.split("|")}
    given = "None" if value is None else type(value).__name__
    return declared == "None" or given in kinds or (given == "int" and "float" in kinds)
