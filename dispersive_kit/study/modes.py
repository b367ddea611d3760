"""The numbers that differ between smoke (CI, 30 s), class (3 minutes on two cores) and full mode, for each notebook."""

from types import SimpleNamespace
from typing import Any

MODES = ("smoke", "class", "full")

# notebook -> setting -> (smoke, class, full)
SETTINGS: dict[str, dict[str, tuple[Any, Any, Any]]] = {
    "00_start_here": {},
    "02_denoiser_2d": {
        "train_steps": (300, 3000, 20000),
        "batch_size": (256, 512, 1024),
        "points": (500, 2000, 5000),
    },
    "04_dispersive_loss": {
        "descent_steps": (100, 600, 2000),
        "dim": (48, 384, 768),
    },
    "06_does_it_help": {
        "preset": ("smoke", "digits", "digits"),
        "images": (64, 500, 500),
        "num_steps": (4, 20, 50),
    },
}


def settings_of(name: str, mode: str) -> SimpleNamespace:
    """The settings of one notebook in one mode."""
    column = MODES.index(mode)
    return SimpleNamespace(**{key: values[column] for key, values in SETTINGS.get(name, {}).items()})
