"""Training: the loop as a generator of step records, exact resume, and runs read back."""

from dispersive_kit.training.config import TRAIN_PRESETS, RegularizerConfig, TrainConfig, train_preset
from dispersive_kit.training.loop import StepRecord, train
from dispersive_kit.training.progress import progress
from dispersive_kit.training.run import load_run

__all__ = [
    "TRAIN_PRESETS",
    "RegularizerConfig",
    "StepRecord",
    "TrainConfig",
    "load_run",
    "progress",
    "train",
    "train_preset",
]
