"""Training: the loop as a generator of step records, exact resume, and runs read back."""

from dispersive_kit.training.config import TRAIN_PRESETS, RegularizerConfig, TrainConfig, train_preset, with_settings
from dispersive_kit.training.loop import StepRecord, train
from dispersive_kit.training.progress import progress
from dispersive_kit.training.run import load_run
from dispersive_kit.training.shipped import export_run, shipped, shipped_names

__all__ = [
    "TRAIN_PRESETS",
    "RegularizerConfig",
    "StepRecord",
    "TrainConfig",
    "export_run",
    "load_run",
    "progress",
    "shipped",
    "shipped_names",
    "train",
    "train_preset",
    "with_settings",
]
