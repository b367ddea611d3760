"""Dispersive Loss: learn it, test it, plug it in.

    from dispersive_kit import Dispersive

    reg = Dispersive(model, "blocks.2", weight=0.5, tau=0.5)
    with reg:
        loss, aux = objective(model, x, y)
    (loss + reg.loss()).backward()

The rooms: regularizers, models, diffusion, data; training; evaluation; study and views. What is imported here needs
torch alone.
"""

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
