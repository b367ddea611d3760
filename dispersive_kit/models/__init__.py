"""Networks: `DiT` and its published checkpoints, `MLP` for points in the plane."""

from dispersive_kit.models.dit import DIT_CONFIGS, DiT, build_dit
from dispersive_kit.models.mlp import MLP
from dispersive_kit.models.published import load_published
