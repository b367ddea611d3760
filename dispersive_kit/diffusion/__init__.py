"""Paths, objectives, samplers and guidance. t = 0 is data and t = 1 is noise, everywhere."""

from .guidance import AutoGuidance, ClassifierFree
from .objectives import Aux, Draws, FlowMatching
from .paths import DDPMPath, GVPPath, LinearPath, Path, VPPath, velocity_field
from .samplers import euler, heun, initial_noise, time_grid

__all__ = [
    "AutoGuidance",
    "Aux",
    "ClassifierFree",
    "DDPMPath",
    "Draws",
    "FlowMatching",
    "GVPPath",
    "LinearPath",
    "Path",
    "VPPath",
    "euler",
    "heun",
    "initial_noise",
    "time_grid",
    "velocity_field",
]
