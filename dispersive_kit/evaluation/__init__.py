"""Evaluation: features, distances, and the record beside every number."""

from dispersive_kit.evaluation.distances import Interval, frechet_distance, frechet_interval
from dispersive_kit.evaluation.features import FeatureExtractor, pca, pixels, small_classifier
from dispersive_kit.evaluation.generate import balanced_labels, decoder_of, generate
from dispersive_kit.evaluation.record import Record, measure_frechet
from dispersive_kit.evaluation.reference import load_reference

__all__ = [
    "FeatureExtractor",
    "Interval",
    "Record",
    "balanced_labels",
    "decoder_of",
    "frechet_distance",
    "frechet_interval",
    "generate",
    "load_reference",
    "measure_frechet",
    "pca",
    "pixels",
    "small_classifier",
]
