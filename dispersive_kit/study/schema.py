"""The forms of result.json and of a pipeline's YAML, as JSON Schema files beside this one."""

import json
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from dispersive_kit.errors import ConfigError, DataError, KitError


def check_form(value: Any, schema: str, where: str, error: type[KitError] = ConfigError) -> None:
    """Hold `value` against the schema "result" or "pipeline".

    Raises:
        error: it has another form; the message names the place within `where` and what was expected there.
    """
    from jsonschema import Draft202012Validator

    faults = sorted(Draft202012Validator(_schema(schema)).iter_errors(value), key=lambda f: list(map(str, f.path)))
    if faults:
        raise error(f"{where}: " + "; ".join(f"{fault.json_path}: {fault.message}" for fault in faults[:3]))


@cache
def _schema(name: str) -> dict[str, Any]:
    return json.loads(Path(__file__).with_name(f"{name}.schema.json").read_text())


def read_result(folder: Path) -> dict[str, Any]:
    """What the run in `folder` measured.

    Raises:
        DataError: there is no result.json, or it is not of the form that `NotebookRun.finish` writes.
    """
    file = folder / "result.json"
    try:
        result = json.loads(file.read_text(), parse_constant=_not_json)
    except FileNotFoundError:
        raise DataError(f"{file} is missing: the notebook did not come to its last cell, nb.finish()") from None
    except ValueError as fault:
        raise DataError(f"{file}: {fault}") from fault
    check_form(result, "result", str(file), DataError)
    return result


def _not_json(word: str) -> NoReturn:
    raise ValueError(f"{word} is no measured number")
