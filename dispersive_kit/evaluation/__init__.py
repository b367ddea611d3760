"""Evaluation: features, distances, and the record beside every number."""

from dispersive_kit.evaluation.distances import frechet_distance
from dispersive_kit.evaluation.features import make_extractor, weights_sha256
from dispersive_kit.evaluation.generate import (
    balanced_labels,
    decoder_of,
    draw_images,
    generate,
    load_reference,
    pixel_gaussian,
)
from dispersive_kit.evaluation.panel import Evaluation, Panel, Record, evaluate, measure_memorisation, table, to_json

__all__ = [
    "Evaluation", "Panel", "Record", "balanced_labels", "decoder_of", "draw_images", "evaluate", "frechet_distance",
    "generate", "load_reference", "make_extractor", "measure_memorisation", "pixel_gaussian", "table", "to_json",
    "weights_sha256",
]  # fmt: skip
