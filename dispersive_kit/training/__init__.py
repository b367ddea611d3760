"""Training: the loop as a generator of step records, exact resume, and runs read back."""

from dispersive_kit.training.config import TRAIN_PRESETS, RegularizerConfig, TrainConfig, train_preset, with_settings
from dispersive_kit.training.runs import export_run, load_run, read_metrics, run_folder, shipped_names
from dispersive_kit.training.train import StepRecord, progress, train
