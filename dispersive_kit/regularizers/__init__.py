"""Dispersive Loss: the functions, the plug-in for any `nn.Module`, and the methods it is compared with."""

from dispersive_kit.regularizers.attach import Dispersive
from dispersive_kit.regularizers.losses import KINDS, PRESETS, RIVALS, LossOptions, dispersive_loss, floor
from dispersive_kit.regularizers.rivals import REPA, CleanPatch, LayerSync, NormMatched
from dispersive_kit.regularizers.stats import Stats, depth_use
from dispersive_kit.regularizers.taps import Schedule
