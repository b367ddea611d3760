"""Dispersive Loss: learn it, test it, plug it in.

    from dispersive_kit import Dispersive

    reg = Dispersive(model, "blocks.2", weight=0.5, tau=0.5)
    with reg:
        loss, aux = objective(model, x, y)
    (loss + reg.loss()).backward()

The rooms: regularizers, models, diffusion, data; training; evaluation; study and views. What is imported here needs
torch alone, and not before it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dispersive_kit.diffusion.guidance import ClassifierFree
    from dispersive_kit.diffusion.objectives import FlowMatching
    from dispersive_kit.diffusion.samplers import euler, heun, initial_noise, time_grid
    from dispersive_kit.errors import KitError
    from dispersive_kit.models.dit import DiT, build_dit
    from dispersive_kit.models.mlp import MLP
    from dispersive_kit.regularizers import Dispersive, dispersive_loss

__version__ = "0.2.0"

__all__ = [
    "MLP",
    "ClassifierFree",
    "DiT",
    "Dispersive",
    "FlowMatching",
    "KitError",
    "build_dit",
    "dispersive_loss",
    "euler",
    "heun",
    "initial_noise",
    "time_grid",
]

_HOMES = {
    "diffusion.guidance": ("ClassifierFree",),
    "diffusion.objectives": ("FlowMatching",),
    "diffusion.samplers": ("euler", "heun", "initial_noise", "time_grid"),
    "errors": ("KitError",),
    "models.dit": ("DiT", "build_dit"),
    "models.mlp": ("MLP",),
    "regularizers": ("Dispersive", "dispersive_loss"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `dispersive-kit --help` needs no PyTorch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"dispersive_kit.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
