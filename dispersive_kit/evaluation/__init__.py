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
