"""Evaluation: features, distances, and the record beside every number."""

from dispersive_kit.evaluation.distances import Interval, frechet_distance, frechet_interval
from dispersive_kit.evaluation.features import FeatureExtractor, inception, pca, pixels, small_classifier
from dispersive_kit.evaluation.generate import balanced_labels, decoder_of, generate
from dispersive_kit.evaluation.moments import Moments, stream_moments
from dispersive_kit.evaluation.neighbours import Memorisation, memorisation
from dispersive_kit.evaluation.panel import Features, Panel, measure_frechet, measure_memorisation
from dispersive_kit.evaluation.record import Record
from dispersive_kit.evaluation.reference import draw_images, load_reference
from dispersive_kit.evaluation.transport import exact_w2

__all__ = [
    "FeatureExtractor",
    "Features",
    "Interval",
    "Memorisation",
    "Moments",
    "Panel",
    "Record",
    "balanced_labels",
    "decoder_of",
    "draw_images",
    "exact_w2",
    "frechet_distance",
    "frechet_interval",
    "generate",
    "inception",
    "load_reference",
    "measure_frechet",
    "measure_memorisation",
    "memorisation",
    "pca",
    "pixels",
    "small_classifier",
    "stream_moments",
]
