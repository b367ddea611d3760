"""The panel: several distances beside each other, each with its interval, its real-against-real floor and its record.

No number sees everything: the Frechet distance misses local spread, precision to coverage miss class proportions.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from dispersive_kit.data import ImageSet, load_images
from dispersive_kit.data.files import versions
from dispersive_kit.errors import ConfigError, DataError
from dispersive_kit.evaluation import distances
from dispersive_kit.evaluation.distances import Array, Halves, Memorisation, Valued
from dispersive_kit.evaluation.features import Extractors, FeatureExtractor, make_extractor
from dispersive_kit.evaluation.generate import (
    balanced_labels,
    decoder_of,
    draw_images,
    generate,
    load_reference,
    this_process,
)
from dispersive_kit.evaluation.record import Record, describe_set, number_name, refuse_fid, weights_sha256
from dispersive_kit.training import load_run
from dispersive_kit.training.batches import stream
from dispersive_kit.training.runs import OBJECTIVES, run_folder

METRICS = ("FD", "KID", "PRDC")
NEIGHBOURS, RESAMPLES = 5, 100


def _measured(metrics: Sequence[str], x: Array, y: Array, halves: Halves) -> dict[str, Valued]:
    """Each number of x (N, D) against y (M, D) by name."""
    found: dict[str, Valued] = {}
    if "FD" in metrics:
        found["FD"] = distances.frechet_on_halves(x, y, halves)
    if "KID" in metrics:
        found["KID"] = distances.kid(x, y, halves)
    return found | (distances.prdc(x, y, halves, k=NEIGHBOURS) if "PRDC" in metrics else {})


def _ends(metric: str, value: float, halves: Array, n: int) -> tuple[float, float]:
    """Of the interval: precision is a share of n images that are each in a real ball or not; shares end at 0 and 1."""
    low, high = distances.interval(value, halves)
    if metric == "precision" and len(halves):
        return distances.wilson(value, n)
    return (max(low, 0.0), min(high, 1.0)) if metric in ("recall", "coverage") else (low, high)


class Panel:
    """One extractor, one reference set and one set of other real images for the floor, to measure any samples with.

    Raises:
        ConfigError: a metric is not in `METRICS`.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        real: ImageSet,
        reference: ImageSet,
        *,
        metrics: Sequence[str] = METRICS,
        resamples: int = RESAMPLES,
    ) -> None:
        if unknown := set(metrics) - set(METRICS):
            raise ConfigError(f"unknown metric {sorted(unknown)}; there are: {', '.join(METRICS)}")
        self.extractor, self.real, self.reference = extractor, real, reference
        self.metrics, self.resamples = metrics, resamples
        self.y = extractor(reference.images).astype(np.float64)
        self._floors: dict[int, dict[str, Valued]] = {}

    def measure(self, generated: Tensor, *, protocol: dict[str, Any] | None = None) -> list[Record]:
        """A record a metric for uint8 images (N, C, H, W). protocol: how they were made, for the record.

        The floor is what N of the other real images, drawn at random, get; all of them, where there are fewer.
        """
        n, others = len(generated), draw_images(self.real, len(generated))
        found = self._measure(generated, distances.half_samples(n, self.resamples))
        if n not in self._floors:
            self._floors[n] = self._measure(others.images, distances.half_samples(len(others), 0))
        everything = _protocol(
            self.extractor, describe_set(self.reference), describe_set(others), self.resamples,
            neighbours=NEIGHBOURS, **(protocol or {}),
        )  # fmt: skip
        records = []
        for metric, (value, halves) in found.items():
            name = number_name(metric, everything["extractor"], n, everything["reference"])
            numbers = (value, *_ends(metric, value, halves, n), self._floors[n][metric][0])
            better: Literal["lower", "higher"] = "lower" if metric in ("FD", "KID") else "higher"
            records.append(Record(name, *numbers, n, len(self.reference), everything, better))
        return records

    def _measure(self, images: Tensor, halves: Halves) -> dict[str, Valued]:
        return _measured(self.metrics, self.extractor(images).astype(np.float64), self.y, halves)


def _protocol(
    extractor: FeatureExtractor, reference: dict[str, Any], floor: dict[str, Any], resamples: int, **own: Any
) -> dict[str, Any]:
    """What every number of this kit says about how it was measured, and its own."""
    return {
        "reference": reference,
        "floor": floor,
        "extractor": extractor.card(),
        "resize": f"{reference['resize']}, then the extractor's own",
        "uint8_rule": "round(127.5 x + 127.5), clamped to 0..255",
        "interval": f"95 %, {resamples} half-samples of the generated images, seed 0; of precision, Wilson's",
        "versions": versions(),
        **own,
    }


def measure_memorisation(
    generated: Tensor,
    train: ImageSet,
    held_out: ImageSet,
    extractor: FeatureExtractor,
    *,
    protocol: dict[str, Any] | None = None,
) -> tuple[Record, Memorisation]:
    """How near generated images are to training images, over how near held-out ones are, as a record and in detail."""
    sets = (extractor(images) for images in (generated, held_out.images, train.images))
    found, n, floor = distances.memorisation(*sets, resamples=RESAMPLES), len(generated), describe_set(held_out)
    reference = {**describe_set(train), "held_out": floor}
    everything = _protocol(extractor, reference, floor, RESAMPLES, copies=found.copies, **(protocol or {}))
    name = number_name("nearest-train", everything["extractor"], n, reference)
    return Record(name, found.ratio, found.low, found.high, found.floor, n, len(train), everything, "about 1"), found


@dataclass(frozen=True)
class Evaluation:
    """What is measured, against what, and how the samples are drawn: the options of `dispersive-kit evaluate`."""

    extractor: Extractors = "classifier"
    metrics: Literal["panel", "FD", "FID"] = "panel"
    reference: Literal["test", "train"] = "test"
    num: int = 500
    num_steps: int = 25
    cfg_scale: float = 1.0
    seed: int = 0
    memorisation: bool = False
    data: str | None = None
    vae: str | None = None

    def __post_init__(self) -> None:
        for name, low in {"num": 4, "num_steps": 1}.items():  # half-samples need two images each
            if (value := getattr(self, name)) < low:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")


def evaluate(source: Path, how: Evaluation) -> list[Record]:
    """Measure a run folder, a shipped run by name, or an .npz of samples; each process of a launcher takes its part.

    Raises:
        CheckpointError: no run. DataError: data or samples cannot be read. ConfigError: options that do not fit, or
            FID asked of a number that is not.
    """
    device = this_process().device
    if source.suffix == ".npz":
        images, protocol = _samples_of(source, how)
        train, held_out = (load_images(str(how.data), split, size=images.shape[-1]) for split in ("train", "test"))
    else:
        model, card = load_run(run_folder(source))
        decode = decoder_of(card, device=device, path=how.vae)
        train, held_out = load_reference(card["config"].changed(data=how.data or card["config"].data), decode)
    extractor = make_extractor(how.extractor, train, held_out, device=device)
    reference, others = (held_out, train) if how.reference == "test" else (train, held_out)
    if how.metrics == "FID":
        refuse_fid(extractor.card(), how.num, describe_set(reference))
    if source.suffix != ".npz":
        images, protocol = _drawn(model.to(device), card, decode, how)
    if images.shape[1:] != train.images.shape[1:]:
        raise ConfigError(f"the samples are {tuple(images.shape[1:])}, {train.name} is {tuple(train.images.shape[1:])}")
    metrics = METRICS if how.metrics == "panel" else ("FD",)
    records = Panel(extractor, others, reference, metrics=metrics).measure(images, protocol=protocol)
    if how.memorisation:
        records.append(measure_memorisation(images, train, held_out, extractor, protocol=protocol)[0])
    return records


def _samples_of(file: Path, how: Evaluation) -> tuple[Tensor, dict[str, Any]]:
    """`how.num` samples of an .npz, and what the record says of them."""
    if how.data is None:
        raise ConfigError(f"{file} does not say what it is compared with: name the data set with --data")
    of_sampling = ("num_steps", "cfg_scale", "seed", "vae")
    if asked := [name for name in of_sampling if getattr(how, name) != getattr(Evaluation, name)]:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise ConfigError(f"{file} holds samples that are drawn already: {named} would change nothing")
    try:  # the form of ADM's evaluation suite
        with np.load(file, allow_pickle=False) as arrays:
            found = arrays["arr_0"]
    except (OSError, KeyError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise DataError(f"{file} holds no samples (an array arr_0): {error}") from error
    if found.dtype != np.uint8 or found.ndim != 4 or found.shape[3] not in (1, 3):
        raise DataError(f"{file}: arr_0 must be uint8 (N, H, W, 1 or 3), got {found.dtype} {found.shape}")
    images = torch.from_numpy(found).permute(0, 3, 1, 2).contiguous()
    if len(images) < how.num:
        raise ConfigError(f"{file} holds {len(images)} samples: give --num {len(images)}, or fewer")
    if len(images) > how.num:  # drawn: the file may be sorted by class
        images = images[torch.randperm(len(images), generator=stream(0, "samples"))[: how.num]]
    return images, {"samples": {"file": file.name, "sha256": hashlib.sha256(images.numpy().tobytes()).hexdigest()}}


def _drawn(model: Any, card: dict[str, Any], decode: Any, how: Evaluation) -> tuple[Tensor, dict[str, Any]]:
    """`how.num` samples of a run, and what the record says of them."""
    config, labels = card["config"], balanced_labels(how.num, model.num_classes)
    settings: dict[str, Any] = {"num_steps": how.num_steps, "cfg_scale": how.cfg_scale, "first_seed": how.seed}
    return generate(model, labels, objective=config.objective, decode=decode, **settings), {
        "run": card["run"],
        "step": card["step"],
        "weights": card["weights"],
        "checkpoint_sha256": weights_sha256(model.state_dict()),
        "training_seed": config.seed,
        "sampler": OBJECTIVES[config.objective][1].__name__,
        "labels": "classes in turn",
        "autoencoder": card["data"].get("autoencoder"),
        "device": this_process().device.type,
        **settings,
    }


def record_folder(source: Path) -> Path:
    """Where the records go unless told: beside the samples, in the run, or here for a shipped run."""
    return Path() if run_folder(source) != source else source.parent if source.suffix == ".npz" else source


def record_file(source: Path, how: Evaluation, record: Record) -> Path:
    """The file of the records in `record_folder`; one file a setting, none overwritten."""
    settings = {key: value for key, value in asdict(how).items() if key != "vae"}
    settings["step"] = record.protocol.get("step")  # the newest is another one tomorrow
    mark = hashlib.sha256(repr(settings).encode()).hexdigest()[:6]
    name = f"{source.stem}-{how.metrics}-{how.extractor}-{how.reference}-N{how.num}-cfg{how.cfg_scale:g}-{mark}"
    return record_folder(source) / f"evaluation-{name}.json"
