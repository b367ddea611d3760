"""Dispersive Loss: the family as functions, the plug-in for any `nn.Module`, and what it is compared with."""

from .attach import Dispersive
from .baselines import REPA, LayerSync, contrastive_loss
from .losses import KINDS, PRESETS, LossOptions, dispersive_loss, floor
from .schedules import Schedule
from .stats import Stats

__all__ = [
    "KINDS",
    "PRESETS",
    "REPA",
    "Dispersive",
    "LayerSync",
    "LossOptions",
    "Schedule",
    "Stats",
    "contrastive_loss",
    "dispersive_loss",
    "floor",
]
