"""Networks: `DiT` (and its published checkpoints), `MLP` for points in the plane."""

from .dit import DIT_CONFIGS, DiT, build_dit
from .mlp import MLP

__all__ = ["DIT_CONFIGS", "MLP", "DiT", "build_dit"]
