"""Dispersive Loss: the family as functions, the plug-in for any `nn.Module`, and what it is compared with."""

from .attach import Dispersive
from .baselines import REPA, LayerSync, NormMatched, contrastive_loss
from .losses import dispersive_loss, floor
from .options import KINDS, PRESETS, LossOptions
from .schedules import Schedule
from .stats import Stats

__all__ = [
    "KINDS",
    "PRESETS",
    "REPA",
    "Dispersive",
    "LayerSync",
    "LossOptions",
    "NormMatched",
    "Schedule",
    "Stats",
    "contrastive_loss",
    "dispersive_loss",
    "floor",
]
