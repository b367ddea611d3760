"""The record beside every number: what it was measured with, so that it can be measured again."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dispersive_kit.data import ImageSet
from dispersive_kit.evaluation.distances import frechet_distance, frechet_interval
from dispersive_kit.evaluation.features import FeatureExtractor

UINT8_RULE = "round(127.5 x + 127.5), clamped to 0..255"


@dataclass(frozen=True)
class Record:
    """One measured number.

    Attributes:
        name: e.g. "FD[digits-classifier48, N=500]". low, high: 95 % interval over resamples of the generated set.
        floor: the same distance between real and real of the same size. protocol: everything else.
    """

    name: str
    value: float
    low: float
    high: float
    floor: float
    n: int
    n_reference: int
    protocol: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        return f"{self.name} = {self.value:.2f} [{self.low:.2f}, {self.high:.2f}], real against real {self.floor:.2f}"


def measure_frechet(
    generated: Tensor,
    train: ImageSet,
    held_out: ImageSet,
    extractor: FeatureExtractor,
    *,
    protocol: dict[str, Any] | None = None,
) -> Record:
    """Frechet distance of generated uint8 images (N, C, H, W) to the held-out real ones, with its record.

    The floor is the distance of the first N training images to the same held-out images: what a model that drew
    real images would get at this N.
    """
    reference = extractor(held_out.images)
    features = extractor(generated)
    interval = frechet_interval(features, reference)
    return Record(
        name=f"FD[{extractor.name}, N={len(generated)}]",
        value=interval.value,
        low=interval.low,
        high=interval.high,
        floor=frechet_distance(extractor(train.images[: len(generated)]), reference),
        n=len(generated),
        n_reference=len(held_out),
        protocol={
            "reference": {"data": held_out.name, "split": held_out.split, "sha256": held_out.sha256},
            "extractor": {
                "name": extractor.name,
                "version": extractor.version,
                "weights_sha256": extractor.weights_sha256,
                "preprocess": extractor.preprocess,
                "note": extractor.note,
            },
            "resize": "none",
            "uint8_rule": UINT8_RULE,
            **(protocol or {}),
        },
    )
