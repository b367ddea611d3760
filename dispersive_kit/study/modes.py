"""The numbers that differ between smoke (CI, 30 s), class (3 minutes on two cores) and full mode, for each notebook."""

from types import SimpleNamespace
from typing import Any

MODES = ("smoke", "class", "full")

# notebook -> setting -> (smoke, class, full)
SETTINGS: dict[str, dict[str, tuple[Any, Any, Any]]] = {
    "00_start_here": {},
    "02_denoiser_2d": {
        "train_steps": (200, 1200, 20000),
        "batch_size": (128, 256, 1024),
        "points": (300, 1000, 2000),
        "max_error": (0.35, 0.12, 0.08),  # share of |v|^2 that the learned field may miss
        "max_w2": (0.8, 0.5, 0.5),  # distance of the samples to the data, in those of the untrained net
    },
    "04_dispersive_loss": {
        "descent_steps": (60, 300, 2000),
    },
    "06_does_it_help": {
        "preset": ("smoke", "digits", "digits"),
        "images": (64, 500, 500),
        "num_steps": (4, 20, 50),
    },
    "09_dispersion": {
        "images": (200, 1297, 1297),
        "noise_images": (64, 200, 1297),  # of which three draws of noise are taken
        "batches": (2, 8, 32),  # over which gradients are compared
    },
    "10_linear_probes": {
        "train": (300, 997, 997),
        "validation": (100, 300, 300),
        "test": (200, 500, 500),
        "draws": (1, 3, 3),
    },
    "11_umap": {},
}


def settings_of(name: str, mode: str) -> SimpleNamespace:
    """The settings of one notebook in one mode."""
    column = MODES.index(mode)
    return SimpleNamespace(**{key: values[column] for key, values in SETTINGS.get(name, {}).items()})
