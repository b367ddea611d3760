"""Dispersive Loss: the family as functions, the plug-in for any `nn.Module`, and what it is compared with."""

from .attach import Dispersive
from .losses import KINDS, PRESETS, LossOptions, dispersive_loss, floor
from .schedules import Schedule
from .stats import Stats

__all__ = ["KINDS", "PRESETS", "Dispersive", "LossOptions", "Schedule", "Stats", "dispersive_loss", "floor"]
