"""Dispersive Loss: learn it, test it, plug it in.

    from dispersive_kit import Dispersive

    reg = Dispersive(model, "blocks.2", weight=0.5, tau=0.5)
    with reg:
        loss, aux = objective(model, x, y)
    (loss + reg.loss()).backward()

Subpackages: regularizers, models, diffusion, data, training, evaluation, analysis, study, views. The names imported
here need PyTorch only, and PyTorch is imported at their first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers; the names are those of _HOMES
    # ruff: noqa: F401
    from dispersive_kit.diffusion.guidance import ClassifierFree
    from dispersive_kit.diffusion.objectives import FlowMatching
    from dispersive_kit.diffusion.samplers import euler, heun, initial_noise, time_grid
    from dispersive_kit.errors import KitError
    from dispersive_kit.models.dit import DiT, build_dit
    from dispersive_kit.models.mlp import MLP
    from dispersive_kit.regularizers import Dispersive, dispersive_loss

__version__ = "0.2.0"

_HOMES = {
    "MLP": "models.mlp", "ClassifierFree": "diffusion.guidance", "DiT": "models.dit", "Dispersive": "regularizers",
    "FlowMatching": "diffusion.objectives", "KitError": "errors", "build_dit": "models.dit",
    "dispersive_loss": "regularizers", "euler": "diffusion.samplers", "heun": "diffusion.samplers",
    "initial_noise": "diffusion.samplers", "time_grid": "diffusion.samplers",
}  # fmt: skip
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `dispersive-kit --help` does not import PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"dispersive_kit.{_HOMES[name]}"), name)
