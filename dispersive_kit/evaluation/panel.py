"""The panel: several distances beside each other, each with its interval, its real-against-real floor and its record.

No number sees everything: Frechet distance and MMD miss local spread, precision to coverage miss class proportions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dispersive_kit.data import ImageSet
from dispersive_kit.data.files import file_sha256, versions
from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation import kernels, naming
from dispersive_kit.evaluation.distances import Array, Interval, frechet_halves, half_samples, wilson
from dispersive_kit.evaluation.features import FeatureExtractor
from dispersive_kit.evaluation.moments import (
    Moments,
    frechet_from_statistics,
    load_statistics,
    stated_extractor,
)
from dispersive_kit.evaluation.neighbours import Memorisation, memorisation, prdc
from dispersive_kit.evaluation.processes import check_equal_everywhere, shared_out
from dispersive_kit.evaluation.record import UINT8_RULE, Record, describe_extractor, describe_set
from dispersive_kit.evaluation.reference import draw_images
from dispersive_kit.evaluation.scores import IS_SPLITS, classifier_score
from dispersive_kit.evaluation.transport import PROJECTIONS, sliced_w2

NEIGHBOURS = 5
HIGHER_IS_BETTER = {"precision", "recall", "density", "coverage", "CS"}
Measured = dict[str, tuple[float, Array]]  # name -> value, values on half-samples


@dataclass(frozen=True)
class Features:
    """Features (N, D) and, where the extractor classifies, logits (N, K)."""

    values: Array
    logits: Array | None

    @classmethod
    def of(cls, extractor: FeatureExtractor, images: Tensor, *, batch_size: int = 256) -> "Features":
        """Of uint8 images (N, C, H, W); processes take batches in turn, and each gets all."""
        check_equal_everywhere(f"the extractor {extractor.name}", (extractor.weights_sha256, extractor.note))
        parts = shared_out(lambda rows: extractor.features_and_logits(images[rows]), len(images), batch_size)
        values, logits = zip(*parts, strict=True)
        return cls(np.concatenate(values).astype(np.float64), None if logits[0] is None else np.concatenate(logits))


@dataclass(frozen=True)
class Pair:
    """Generated x against the reference y, the half-samples of x, and how IS-like scores are split."""

    x: Features
    y: Features
    halves: NDArray[np.bool_]
    splits: int = 1


def _mmd(pair: Pair, kernel: kernels.Kernel) -> tuple[float, Array]:
    return kernels.mmd2(pair.x.values, pair.y.values, kernel, pair.halves)


def _score(pair: Pair) -> Measured:
    if pair.x.logits is None:  # an extractor that does not classify has no such score
        return {}
    return {"CS": classifier_score(pair.x.logits, pair.halves, splits=pair.splits)}


METRICS: dict[str, Callable[[Pair], Measured]] = {
    "FD": lambda p: {"FD": frechet_halves(p.x.values, p.y.values, p.halves)},
    "KID": lambda p: {"KID": _mmd(p, kernels.polynomial)},
    "MMD-RBF": lambda p: {"MMD-RBF": _mmd(p, kernels.rbf(kernels.median_distance(p.y.values)))},
    "energy": lambda p: {"energy": _mmd(p, kernels.minus_distance)},
    "sliced-W2": lambda p: {"sliced-W2": sliced_w2(p.x.values, p.y.values, p.halves)},
    "PRDC": lambda p: dict(prdc(p.x.values, p.y.values, p.halves, k=NEIGHBOURS)),
    "CS": _score,
}


class Panel:
    """One extractor, one reference set and one set of other real images for the floor, to measure any samples with.

    Features of real images are extracted once.

    Raises:
        ConfigError: a metric is not in `METRICS`.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        real: ImageSet,
        reference: ImageSet,
        *,
        metrics: Sequence[str] = tuple(METRICS),
        resamples: int = 100,
    ) -> None:
        if unknown := set(metrics) - set(METRICS):
            raise ConfigError(f"unknown metric {sorted(unknown)}; there are: {', '.join(METRICS)}")
        self.extractor, self.real, self.reference = extractor, real, reference
        self.metrics, self.resamples = metrics, resamples
        self.y = Features.of(extractor, reference.images)
        self._floors: dict[tuple[int, int], dict[str, float]] = {}

    def measure(self, generated: Tensor, *, protocol: dict[str, Any] | None = None) -> list[Record]:
        """A record a metric for uint8 images (N, C, H, W). protocol: how they were made, for the record.

        The floor is what N of the other real images, drawn at random, get; all of them, where there are fewer.
        """
        n, card = len(generated), describe_extractor(self.extractor)
        splits = IS_SPLITS if not naming.unmet("IS", card, n, {}) else 1
        measured = self._apply(Features.of(self.extractor, generated), half_samples(n, self.resamples), splits)
        floors, everything = self._floor(n, splits), self._protocol(n, protocol or {})
        return [
            _record(name, *pair, floors[name], n, len(self.reference), everything) for name, pair in measured.items()
        ]

    def _apply(self, x: Features, halves: NDArray[np.bool_], splits: int) -> Measured:
        found: Measured = {}
        for metric in self.metrics:
            found |= METRICS[metric](Pair(x, self.y, halves, splits))
        return found

    def _floor(self, n: int, splits: int) -> dict[str, float]:
        if (n, splits) not in self._floors:
            x = Features.of(self.extractor, draw_images(self.real, n).images)
            measured = self._apply(x, np.zeros((0, len(x.values)), dtype=bool), splits)
            self._floors[n, splits] = {name: value for name, (value, _) in measured.items()}
        return self._floors[n, splits]

    def _protocol(self, n: int, given: dict[str, Any]) -> dict[str, Any]:
        floor = describe_set(draw_images(self.real, n))
        return shared_protocol(self.extractor, describe_set(self.reference), floor, self.resamples) | {
            "neighbours": NEIGHBOURS,
            "projections": PROJECTIONS,
            "rbf_bandwidth": kernels.median_distance(self.y.values),
            **given,
        }


def _record(
    metric: str, value: float, halves: Array, floor: float, n: int, n_reference: int | None, protocol: dict[str, Any]
) -> Record:
    low, high = _ends(metric, value, halves, n)
    better: Literal["lower", "higher"] = "higher" if metric in HIGHER_IS_BETTER else "lower"
    name = naming.number_name(metric, protocol["extractor"], n, protocol["reference"])
    return Record(name, value, low, high, floor, n, n_reference, protocol, better)


def _ends(metric: str, value: float, halves: Array, n: int) -> tuple[float, float]:
    """Of the interval: precision is a share of n images that are each in a real ball or not; shares end at 0 and 1."""
    interval = Interval.around(value, halves)
    if metric == "precision" and len(halves):
        return wilson(value, n)
    if metric in ("recall", "coverage"):
        return max(interval.low, 0.0), min(interval.high, 1.0)
    return interval.low, interval.high


def shared_protocol(
    extractor: FeatureExtractor, reference: dict[str, Any], floor: dict[str, Any], resamples: int
) -> dict[str, Any]:
    """What every number of this kit says about how it was measured."""
    return {
        "reference": reference,
        "floor": floor,
        "extractor": describe_extractor(extractor),
        "resize": f"{reference.get('resize', 'not known')}, then the extractor's own",
        "uint8_rule": UINT8_RULE,
        "interval": f"95 %, {resamples} half-samples of the generated images, seed 0; of precision, Wilson's",
        "versions": versions(),
    }


def measure_frechet(
    generated: Tensor,
    train: ImageSet,
    held_out: ImageSet,
    extractor: FeatureExtractor,
    *,
    protocol: dict[str, Any] | None = None,
) -> Record:
    """Frechet distance of generated uint8 images (N, C, H, W) to the held-out real ones, with its record.

    The floor is the distance of N random training images to the same held-out images: what a model that drew real
    images would get at this N.
    """
    return Panel(extractor, train, held_out, metrics=("FD",)).measure(generated, protocol=protocol)[0]


def measure_against_statistics(
    generated: Tensor,
    real: ImageSet,
    statistics: Path,
    extractor: FeatureExtractor,
    *,
    resamples: int = 20,
    protocol: dict[str, Any] | None = None,
) -> Record:
    """Frechet distance to a reference of which only mean and covariance are kept, e.g. ADM's files.

    real: images for the floor; of those that the statistics are of, it would be too low.

    Raises:
        DataError: the file holds no statistics. ConfigError: they are of another extractor, by what the file says or,
            where it says nothing, as ADM's, by their size.
    """
    reference, n = load_statistics(statistics, extractor.weights_sha256), len(generated)

    def distance(features: Array) -> float:
        moments = Moments.of(features)
        return frechet_from_statistics(moments.mean, moments.covariance, *reference)

    x = Features.of(extractor, generated).values
    halves = np.array([distance(x[half]) for half in half_samples(n, resamples)])
    others = draw_images(real, n)
    floor = distance(Features.of(extractor, others.images).values)
    card = {"data": statistics.stem, "split": None, "n": None, "sha256": file_sha256(statistics)}
    card["extractor"] = stated_extractor(statistics) or "not stated in the file"
    everything = shared_protocol(extractor, card, describe_set(others), resamples) | (protocol or {})
    return _record("FD", distance(x), halves, floor, n, None, everything)


def measure_memorisation(
    generated: Tensor,
    train: ImageSet,
    held_out: ImageSet,
    extractor: FeatureExtractor,
    *,
    resamples: int = 100,
    protocol: dict[str, Any] | None = None,
) -> tuple[Record, Memorisation]:
    """How near generated images are to training images, over how near held-out ones are, as a record and in detail."""
    sets = (Features.of(extractor, images).values for images in (generated, held_out.images, train.images))
    found, n = memorisation(*sets, resamples=resamples), len(generated)
    card, floor = {**describe_set(train), "held_out": describe_set(held_out)}, describe_set(held_out)
    everything = shared_protocol(extractor, card, floor, resamples) | {"copies": found.copies, **(protocol or {})}
    name = naming.number_name("nearest-train", everything["extractor"], n, card)
    ratio = found.ratio
    record = Record(name, ratio.value, ratio.low, ratio.high, found.floor, n, len(train), everything, better="about 1")
    return record, found
