"""Analysis: geometry of features by block and noise level, probes, and pictures of features."""

from dispersive_kit.analysis.features import (
    LEVELS,
    POOLS,
    encoder,
    extract,
    load_with_images,
    noisy,
    random_network,
    raw_pixels,
    tokens,
)
from dispersive_kit.analysis.geometry import Pull, cka_matrix, gradient_pull, mutual_knn
from dispersive_kit.analysis.probes import Split, Splits, candidates, choose_and_test, mcnemar, shuffled
from dispersive_kit.analysis.sweep import stored, sweep
from dispersive_kit.evaluation import draw_images
