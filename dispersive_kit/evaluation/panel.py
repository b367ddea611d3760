"""The panel: several distances beside each other, each with its interval, its real-against-real floor and its record.

No number measures everything: the Frechet distance misses local spread, the others from precision to coverage miss
class proportions. FID is the name of one protocol; the name of every other number states its extractor.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dispersive_kit.data import ImageSet, load_images
from dispersive_kit.data.files import versions
from dispersive_kit.errors import ConfigError, DataError
from dispersive_kit.evaluation import distances, features
from dispersive_kit.evaluation.distances import Array, Measured
from dispersive_kit.evaluation.features import INCEPTION, Extractors, FeatureExtractor, make_extractor
from dispersive_kit.evaluation.generate import Samples, balanced_labels, decoder_of, draw_images, load_reference
from dispersive_kit.training import load_run
from dispersive_kit.training.batches import split_share, stream
from dispersive_kit.training.parallel import this_process
from dispersive_kit.training.runs import run_folder, sampler_of

Card = dict[str, Any]
Better = Literal["lower", "higher", "about 1"]
Images = Tensor | Samples | NDArray[np.floating]  # uint8 (N, C, H, W), `Samples` of them, or features (N, D)
DISTANCES: dict[str, Callable[..., Measured]] = {"FD": distances.frechet, "KID": distances.kid}
METRICS = (*DISTANCES, "PRDC")
PROTOCOL_N = 50_000  # generated images of an FID
NEIGHBOURS, RESAMPLES = 5, 100
ADM_STATISTICS = r"VIRTUAL_imagenet(64|128|256|512)(_labeled)?\.npz"  # names of the files that ADM published
Sets = Callable[[], tuple[ImageSet, ImageSet]]  # training and held-out images, read when they are needed


def _unmet(extractor: Mapping[str, Any], n: int, reference: Mapping[str, Any]) -> list[str]:
    """The conditions of FID that do not hold, in words; see `FeatureExtractor.card` and `describe_set`."""
    name, sha256, file = extractor.get("name"), extractor.get("weights_sha256"), reference.get("file")
    part = f"the reference is {reference.get('n', 0):,} of the {reference.get('drawn_from') or 0:,} images of "
    conditions = {
        f"the features are {name}, not {INCEPTION}": name == INCEPTION,
        "the weights are not the TensorFlow Inception of 2015 by their sha256": sha256 == features.INCEPTION_SHA256,
        f"there are {n:,} images, not {PROTOCOL_N:,}": n == PROTOCOL_N,
        f"{part}{reference.get('data')}": not reference.get("drawn_from"),
        "the reference set has no name": bool(reference.get("data")),
        f"{file} is not the name of a statistics file of ADM": file is None or bool(re.fullmatch(ADM_STATISTICS, file)),
    }
    return [fault for fault, holds in conditions.items() if not holds]


def refuse_fid(extractor: Mapping[str, Any], n: int, reference: Mapping[str, Any]) -> None:
    """Raises ConfigError: the number may not be called FID; the message names every condition that is not met."""
    if faults := _unmet(extractor, n, reference):
        raise ConfigError(f"this is not FID: {'; '.join(faults)}. Call it FD[...], which names its extractor")


def number_name(metric: str, extractor: Mapping[str, Any], n: int, reference: Mapping[str, Any]) -> str:
    """The name of a number, as "FD[digits-classifier48, N=500]"; FID if all of its conditions hold, and only then.

    FID also names the split of its reference: training images and test images give two different numbers. A file of
    statistics is in the name with its sha256, since the kit knows ADM's files only by name.
    """
    file = f"reference {reference['file']} sha256 {reference['sha256'][:12]}" if "file" in reference else ""
    if metric != "FD" or _unmet(extractor, n, reference):
        return f"{metric}[{', '.join(filter(None, (extractor['name'], file, f'N={n}')))}]"
    return f"FID[{file or ' '.join(filter(None, (reference['data'], reference.get('split'))))}, N={n}]"


@dataclass(frozen=True)
class Record:
    """One measured number.

    name: e.g. "FD[digits-classifier48, N=500]". low, high: its 95 % interval, NaN where there is none. floor: the value
    of real images of another split: the best to expect, lowest or (`better="higher"`) highest. protocol: all the rest.
    Raises ConfigError: the name is FID, and the protocol is not that of FID.
    """

    name: str
    value: float
    low: float
    high: float
    floor: float
    n: int
    n_reference: int
    protocol: Card = field(default_factory=dict)
    better: Better = "lower"

    def __post_init__(self) -> None:
        if self.name.partition("[")[0].strip() == "FID":
            refuse_fid(self.protocol.get("extractor", {}), self.n, self.protocol.get("reference", {}))

    def fields(self) -> Card:
        """The fields for JSON, with None in place of NaN."""
        return {name: None if value != value else value for name, value in asdict(self).items()}

    def in_words(self) -> tuple[str, str, str]:
        """Value, interval and floor. A floor of fewer real images shows their number, and is too high."""
        ends = "none" if self.low != self.low else f"[{self.low:.4g}, {self.high:.4g}]"
        of = self.protocol.get("floor", {}).get("n", self.n)
        floor = "none" if self.floor != self.floor else f"{self.floor:.4g}"
        return f"{self.value:.4g}", ends, floor + (f" (N={of})" if of < self.n else "")

    def __str__(self) -> str:
        value, ends, floor = self.in_words()
        return f"{self.name} = {value}, interval {ends}, real against real {floor}"


def _record(metric: str, numbers: Measured, floor: float, n: int, protocol: Card, better: Better) -> Record:
    """The record of a number of n images, with the name that its protocol gives it."""
    name = number_name(metric, protocol["extractor"], n, reference := protocol["reference"])
    return Record(name, *numbers, floor, n, reference.get("n", 0), protocol, better)


def table(records: Sequence[Record]) -> str:
    """One line for each number: name, value, interval, floor, and whether higher or lower is better."""
    rows = [("", "value", "95 % interval", "real", "better"), *((r.name, *r.in_words(), r.better) for r in records)]
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [[row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], widths, strict=True))] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def to_json(records: Sequence[Record]) -> str:
    """All numbers of one evaluation: the protocol of the first, and with each number what differs in its own."""
    shared, numbers = records[0].protocol, []
    for number in (record.fields() for record in records):
        own = {key: value for key, value in number.pop("protocol").items() if shared.get(key) != value}
        numbers.append({**number, "protocol": own} if own else number)
    return json.dumps({"protocol": shared, "numbers": numbers}, indent=2)


def describe_set(data: ImageSet) -> dict[str, Any]:
    """The description of a set of real images for a record."""
    card = {"data": data.name, "split": data.split, "n": len(data), "sha256": data.sha256, "resize": data.resize}
    return card | ({"drawn_from": data.drawn_from} if data.drawn_from else {})


def _protocol(extractor: FeatureExtractor, reference: Card, floor: Card, resamples: int, own: Card | None) -> Card:
    """How a number was measured: what every record of this kit states, and `own`."""
    return {
        "reference": reference,
        "floor": floor,
        "extractor": extractor.card(),
        "resize": f"{reference.get('resize', 'as the file was made')}, then the extractor's own",
        "uint8_rule": "round(127.5 x + 127.5), clamped to 0..255",
        "interval": f"95 %, {resamples} half-samples of the generated images, seed 0; of precision and copies "
        "Wilson's; of density that of a mean; of recall and coverage none",
        "versions": versions(),
        **(own or {}),
    }


def measured(metrics: Sequence[str], x: NDArray, y: NDArray, resamples: int) -> dict[str, Measured]:
    """Each number of x (N, D) against y (M, D) by name, with its interval."""
    found = {name: measure(x, y, resamples=resamples) for name, measure in DISTANCES.items() if name in metrics}
    return found | (distances.prdc(x, y, k=NEIGHBOURS) if "PRDC" in metrics else {})


@dataclass(eq=False, repr=False)
class Panel:
    """One extractor, one reference set and one set of other real images for the floor, to measure any samples with."""

    extractor: FeatureExtractor
    real: ImageSet
    reference: ImageSet
    metrics: Sequence[str] = METRICS
    resamples: int = RESAMPLES

    def __post_init__(self) -> None:
        if unknown := set(self.metrics) - set(METRICS):
            raise ConfigError(f"unknown metric {sorted(unknown)}; there are: {', '.join(METRICS)}")
        self.y = self.extractor(self.reference.images)
        self._floors: dict[int, dict[str, Measured]] = {}

    def measure(self, generated: Images, *, protocol: Card | None = None) -> list[Record]:
        """One record for each metric, of images or their features. protocol: how they were made, for the record.

        The floor is the value of N of the other real images, drawn at random, or of all if there are fewer.
        """
        n, others = len(generated), draw_images(self.real, len(generated))
        found = measured(self.metrics, _features(self.extractor, generated), self.y, self.resamples)
        if n not in self._floors:
            self._floors[n] = measured(self.metrics, self.extractor(others.images), self.y, 0)
        own = {"neighbours": NEIGHBOURS, **(protocol or {})}
        everything = _protocol(self.extractor, describe_set(self.reference), describe_set(others), self.resamples, own)
        return [
            _record(name, numbers, self._floors[n][name][0], n, everything, "lower" if name in DISTANCES else "higher")
            for name, numbers in found.items()
        ]


def _features(extractor: FeatureExtractor, images: Images) -> NDArray:
    return images if isinstance(images, np.ndarray) else extractor(images)


class Memorisation(NamedTuple):
    """How near samples are to training images, compared with held-out images, which were not trained on.

    ratio: median distance of samples to the nearest training image, divided by that of held-out images: about 1 if
    nothing was copied, near 0 if all was. Its floor compares two halves of the held-out images. copies: share of
    samples nearer than half the mean distance of held-out images. Its floor is this share of held-out images.
    distance, index (N,): of the nearest training image of each sample.
    """

    ratio: Record
    copies: Record
    distance: Array
    index: Any


def measure_memorisation(
    generated: Images, train: ImageSet, held_out: ImageSet, extractor: FeatureExtractor, *, protocol: Card | None = None
) -> Memorisation:
    """`Memorisation` of generated images. Raises ConfigError: half of the held-out images are in the training set."""
    known = extractor(train.images)
    both = (_features(extractor, images) for images in (generated, held_out.images))
    (distance, index), (real, _) = (distances.nearest(x, known) for x in both)
    n, usual = len(generated), float(np.median(real))
    if usual == 0:
        raise ConfigError("half of the held-out images are in the training set: give splits that do not overlap")
    halves = [np.median(distance[half]) / usual for half in distances.half_samples(n, RESAMPLES)]
    ratio, real_ratio = float(np.median(distance)) / usual, float(np.median(real[::2]) / np.median(real[1::2]))
    copied, real_copied = (float((one < real.mean() / 2).mean()) for one in (distance, real))
    floor = describe_set(held_out)
    everything = _protocol(extractor, {**describe_set(train), "held_out": floor}, floor, RESAMPLES, protocol)
    median, share = (ratio, *distances.interval(ratio, halves)), (copied, *distances.wilson(copied, n))
    return Memorisation(
        _record("nearest-train", median, real_ratio, n, everything, "about 1"),
        _record("copies", share, real_copied, n, everything, "lower"),
        distance,
        index,
    )


@dataclass(frozen=True)
class Evaluation:
    """What is measured, against what, and how the samples are drawn: the options of `dispersive-kit evaluate`."""

    extractor: Extractors = "auto"
    metrics: Literal["panel", "FD", "FID"] = "panel"
    reference: str = "test"  # or train, or the .npz of mean and covariance of a reference set
    num: int = 500
    num_steps: int = 25
    cfg_scale: float = 1.0
    seed: int = 0
    memorisation: bool = False
    data: str | None = None
    vae: str | None = None

    def __post_init__(self) -> None:
        if self.num < 4:  # half-samples need two images each
            raise ConfigError(f"--num must be at least 4, got {self.num}")


def evaluate(source: Path, how: Evaluation) -> list[Record]:
    """Measure a run folder, a shipped run by name, or an .npz of samples; each process of a launcher takes its part.

    Raises CheckpointError: no run. DataError: data, samples or statistics cannot be read. ConfigError: options that do
        not fit together, or `metrics` is FID and its conditions do not hold.
    """
    images, protocol, sets = (_samples_of if source.suffix == ".npz" else _drawn)(source, how)
    if how.reference not in ("test", "train"):
        return [_against_statistics(images, protocol, sets, how)]
    train, held_out = sets()
    if (shape := images[:1].shape[1:]) != (real := train.images.shape[1:]):
        raise ConfigError(f"the samples are {tuple(shape)}, {train.name} is {tuple(real)}: name other data with --data")
    trained_on = split_share(train, protocol.get("data_share", 1.0))[0]  # and not the images that were left out
    own = how.data is None and not protocol.get("autoencoder")  # decoded images are not those of the training
    if how.memorisation and own and trained_on.sha256 != protocol["training_data_sha256"]:
        raise DataError(f"{train.source} is not what the run was trained on: restore it, or name images with --data")
    extractor = make_extractor(how.extractor, train, held_out, device=this_process().device)
    reference, others = (held_out, train) if how.reference == "test" else (train, held_out)
    if how.metrics == "FID":
        refuse_fid(extractor.card(), how.num, describe_set(reference))
    x, metrics = extractor(images), METRICS if how.metrics == "panel" else ("FD",)
    records = Panel(extractor, others, reference, metrics=metrics).measure(x, protocol=protocol)
    near = measure_memorisation(x, trained_on, held_out, extractor, protocol=protocol)[:2] if how.memorisation else ()
    return [*records, *near]


def _against_statistics(images: Images, protocol: Card, sets: Sets, how: Evaluation) -> Record:
    """The Frechet distance to mean and covariance from a file. With Inception, no real images are needed."""
    known, reference = distances.read_statistics(Path(how.reference))
    if how.memorisation:
        raise ConfigError("--memorisation compares with images, and the reference has none: give --reference test")
    device, inception = this_process().device, how.extractor == "inception"
    extractor = features.inception_pool3(device) if inception else make_extractor(how.extractor, *sets(), device=device)
    if how.metrics == "FID":
        refuse_fid(extractor.card(), how.num, reference)
    if extractor.dim != len(known[0]):
        raise ConfigError(f"{extractor.name} has {extractor.dim} features, and {reference['file']} {len(known[0])}")
    numbers = distances.frechet(_features(extractor, images), known, resamples=RESAMPLES)
    floor = {"none": "a file of statistics has no images to measure a floor with"}
    everything = _protocol(extractor, reference, floor, RESAMPLES, protocol)
    return _record("FD", numbers, math.nan, how.num, everything, "lower")


def _samples_of(file: Path, how: Evaluation) -> tuple[Tensor, Card, Sets]:
    """`how.num` samples of an .npz, what the record says of them, and the real images they are compared with."""
    of_sampling = ("num_steps", "cfg_scale", "seed", "vae")
    if asked := [name for name in of_sampling if getattr(how, name) != getattr(Evaluation, name)]:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise ConfigError(f"{file} holds samples that are drawn already: {named} would change nothing")
    if how.data is None and not (how.reference.endswith(".npz") and how.extractor == "inception"):
        raise ConfigError(f"{file} does not say what it is compared with: name the data set with --data")
    try:  # the form of ADM's evaluation suite
        with np.load(file, allow_pickle=False) as arrays:
            found = arrays["arr_0"]
    except Exception as error:  # of a damaged archive numpy may raise almost any; the message shows it
        raise DataError(f"{file} holds no samples (an array arr_0): {error}") from error
    if found.dtype != np.uint8 or found.ndim != 4 or found.shape[3] not in (1, 3):
        raise DataError(f"{file}: arr_0 must be uint8 (N, H, W, 1 or 3), got {found.dtype} {found.shape}")
    images = torch.from_numpy(found).permute(0, 3, 1, 2).contiguous()
    if len(images) < how.num:
        raise ConfigError(f"{file} holds {len(images)} samples: give --num {len(images)}, or fewer")
    if len(images) > how.num:  # drawn: the file may be sorted by class
        images = images[torch.randperm(len(images), generator=stream(0, "samples"))[: how.num]]
    protocol = {"samples": {"file": file.name, "sha256": hashlib.sha256(images.numpy().tobytes()).hexdigest()}}
    data, size = str(how.data), images.shape[-1]
    return images, protocol, lambda: (load_images(data, "train", size=size), load_images(data, "test", size=size))


def _drawn(source: Path, how: Evaluation) -> tuple[Samples, Card, Sets]:
    """`how.num` samples of a run, what the record says of them, and the real images they are compared with."""
    model, card = load_run(run_folder(source))
    config, labels, device = card["config"], balanced_labels(how.num, model.num_classes), this_process().device
    decode = decoder_of(card, device=device, path=how.vae)
    settings: Card = {"num_steps": how.num_steps, "cfg_scale": how.cfg_scale, "first_seed": how.seed}
    images = Samples(model.to(device), labels, objective=config.objective, decode=decode, **settings)
    protocol = {
        **{key: card[key] for key in ("run", "step", "weights")},
        "checkpoint_sha256": features.weights_sha256(model.state_dict()),
        "training_seed": config.seed,
        "training_data_sha256": card["data"]["sha256"],
        **({"data_share": config.data_share} if config.data_share < 1 and how.data in (None, config.data) else {}),
        "sampler": sampler_of(config.objective)[0],
        "labels": "classes in turn",
        "autoencoder": card["data"].get("autoencoder"),
        "device": device.type,
        **settings,
    }
    return images, protocol, lambda: load_reference(config.changed(data=how.data or config.data), decode)


def record_folder(source: Path) -> Path:
    """Default folder of records: that of the samples, the run, or the current folder for a shipped run."""
    return Path() if run_folder(source) != source else source.parent if source.suffix == ".npz" else source


def record_file(source: Path, how: Evaluation, record: Record) -> Path:
    """The file of the records in `record_folder`: one for each setting, so that none overwrites another."""
    settings = {key: value for key, value in asdict(how).items() if key != "vae"}
    settings["step"] = record.protocol.get("step")  # the newest step may change later
    mark = hashlib.sha256(repr(settings).encode()).hexdigest()[:6]
    extractor = record.protocol["extractor"]["name"].replace("/", "-")
    name = f"{how.metrics}-{extractor}-{Path(how.reference).stem}-N{how.num}-cfg{how.cfg_scale:g}-{mark}"
    return record_folder(source) / f"evaluation-{source.absolute().stem}-{name}.json"
