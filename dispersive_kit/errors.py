"""The errors of the kit. Each message says what was wrong, where, and what to do about it.

The command line prints a `KitError` or an OSError without a traceback, status 2. Any other exception is a bug.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class KitError(Exception):
    """Base class of every error the kit raises on purpose."""


class ConfigError(KitError, ValueError):
    """A setting, preset, option or parameter is unknown or does not fit the others."""


class DataError(KitError):
    """A data set is missing, damaged or of the wrong form."""


class CheckpointError(KitError):
    """A checkpoint or run folder is missing, damaged, or belongs to another configuration."""


class DispersiveError(KitError, RuntimeError):
    """Dispersive Loss was attached or called in a way that cannot work; the message names the tap and the cure."""


def printable(text: str) -> str:
    """Text from outside, such as a file name, with the control characters escaped: a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def form_error(
    fault: "ValidationError", where: str, kind: type[KitError] = ConfigError, known: Iterable[str] = ()
) -> KitError:
    """The errors that pydantic found in `where` (a file, a run), as one `KitError` with field, value and cure of each.

    known: the valid field names, which the message lists where a field has an unknown name.
    """
    lines = []
    for one in fault.errors(include_url=False)[:3]:
        field = ".".join(str(part) for part in one["loc"])
        given = "" if one["type"] in ("missing", "value_error") else f" = {one['input']!r:.80}"
        cure = _other_name(field, list(known)) if one["type"] == "extra_forbidden" else one["msg"]
        lines.append(f"{field or 'the whole'}{given}: {cure}".removeprefix("the whole: ").replace("Value error, ", ""))
    more = f"; and {fault.error_count() - 3} more" if fault.error_count() > 3 else ""
    return kind(f"{where}: {'; '.join(lines)}{more}")


def _other_name(field: str, known: list[str]) -> str:
    if not known:
        return "no field has this name: remove it"
    near = get_close_matches(field, known, 1)
    return f"no setting has this name{f', did you mean {near[0]}?' if near else ';'} there are: {', '.join(known)}"
