"""Evaluation: features, distances, and the record beside every number."""

from dispersive_kit.evaluation.distances import Interval, frechet_distance, frechet_interval
from dispersive_kit.evaluation.features import FeatureExtractor, pca, pixels, small_classifier
from dispersive_kit.evaluation.generate import balanced_labels, generate
from dispersive_kit.evaluation.record import Record, measure_frechet

__all__ = [
    "FeatureExtractor",
    "Interval",
    "Record",
    "balanced_labels",
    "frechet_distance",
    "frechet_interval",
    "generate",
    "measure_frechet",
    "pca",
    "pixels",
    "small_classifier",
]
