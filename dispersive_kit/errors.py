"""The errors of the kit. Each message says what was wrong, where, and what to do about it.

The command line prints a `KitError` without a traceback and exits with status 2; anything else is a fault of ours.
"""


class KitError(Exception):
    """Base class of every error the kit raises on purpose."""


class ConfigError(KitError, ValueError):
    """A setting, preset, option or parameter is unknown or does not fit the others."""


class DataError(KitError):
    """A data set is missing, damaged or of the wrong form."""


class CheckpointError(KitError):
    """A checkpoint or run folder is missing, damaged, or belongs to another configuration."""


class DispersiveError(KitError, RuntimeError):
    """Dispersive Loss cannot work as attached or called; the message names the tap and the cure."""
