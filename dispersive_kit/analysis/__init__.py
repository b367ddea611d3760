"""Analysis: the geometry of features by block and noise level, what they know, and how they may be pictured."""

from dispersive_kit.analysis.features import (
    LEVELS,
    extract,
    noisy,
    pooled,
    random_network,
    time_of,
    tokens,
)
from dispersive_kit.analysis.gradients import Pull, gradient_pull
from dispersive_kit.analysis.moments import Moments
from dispersive_kit.analysis.probes import Split, Splits, candidates, choose_and_test, mcnemar, shuffled
from dispersive_kit.analysis.similarity import cka_matrix, linear_cka, mutual_knn
from dispersive_kit.analysis.sweep import Sweep, sweep
from dispersive_kit.evaluation import draw_images

__all__ = [
    "LEVELS",
    "Moments",
    "Pull",
    "Split",
    "Splits",
    "Sweep",
    "candidates",
    "choose_and_test",
    "cka_matrix",
    "draw_images",
    "extract",
    "gradient_pull",
    "linear_cka",
    "mcnemar",
    "mutual_knn",
    "noisy",
    "pooled",
    "random_network",
    "shuffled",
    "sweep",
    "time_of",
    "tokens",
]
