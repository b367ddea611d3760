"""A whole evaluation: samples of a run or of a file, real images, extractor, panel."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dispersive_kit.data import ImageSet, load_images
from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation import naming
from dispersive_kit.evaluation.classifier import weights_sha256
from dispersive_kit.evaluation.export import load_npz
from dispersive_kit.evaluation.features import FeatureExtractor, make_extractor
from dispersive_kit.evaluation.generate import balanced_labels, decoder_of, generate
from dispersive_kit.evaluation.options import Evaluation
from dispersive_kit.evaluation.panel import METRICS, Panel, measure_against_statistics, measure_memorisation
from dispersive_kit.evaluation.processes import this_process
from dispersive_kit.evaluation.record import Record, describe_extractor, describe_set
from dispersive_kit.evaluation.reference import draw_images, load_reference
from dispersive_kit.training import load_run
from dispersive_kit.training.draws import stream
from dispersive_kit.training.sampling import SAMPLER_NAMES
from dispersive_kit.training.shipped import run_folder

PLACES = ("data_dir", "inception_weights", "vae")  # options that say where files lie on this machine
METRICS_OF = {"panel": tuple(METRICS), "FD": ("FD",), "FID": ("FD",), "IS": ("CS",)}


def evaluate(source: Path, how: Evaluation) -> list[Record]:
    """Measure a run folder, a shipped run by name, or an .npz of samples; each process of a launcher takes its part.

    Raises:
        CheckpointError: no run. DataError: data or samples cannot be read. ConfigError: options that do not fit, or
            FID or IS asked of numbers that are not.
    """
    given = _Samples(source, how)
    train, held_out = given.real()
    extractor = make_extractor(
        how.extractor, train, held_out, weights=how.inception_weights, device=this_process().device
    )
    if how.metrics in naming.WORDS.values():
        naming.refuse(how.metrics, describe_extractor(extractor), how.num, _reference_card(how, train, held_out))
    images = given.images()
    if images.shape[1:] != train.images.shape[1:]:
        raise ConfigError(f"the samples are {tuple(images.shape[1:])}, {train.name} is {tuple(train.images.shape[1:])}")
    records = _measure(images, train, held_out, extractor, how, given.protocol)
    if how.memorisation:
        record, _ = measure_memorisation(
            images, train, held_out, extractor, resamples=how.resamples, protocol=given.protocol
        )
        records.append(record)
    return records


def _measure(
    images: Tensor,
    train: ImageSet,
    held_out: ImageSet,
    extractor: FeatureExtractor,
    how: Evaluation,
    protocol: dict[str, Any],
) -> list[Record]:
    metrics, resamples = METRICS_OF[how.metrics], how.resamples
    if how.reference not in ("train", "test"):
        if metrics != ("FD",):
            raise ConfigError(
                f"of statistics only the Frechet distance is known: give --metrics FD, or --reference test "
                f"or train instead of {how.reference!r}"
            )
        file = Path(how.reference)
        return [measure_against_statistics(images, train, file, extractor, resamples=resamples, protocol=protocol)]
    real = train if how.reference == "test" else held_out
    reference = _reference(how, train, held_out)
    panel = Panel(extractor, real, reference, metrics=metrics, resamples=resamples)
    return panel.measure(images, protocol=protocol)


def _reference(how: Evaluation, train: ImageSet, held_out: ImageSet) -> ImageSet:
    whole = held_out if how.reference == "test" else train
    wanted = how.num_reference or len(whole)
    return draw_images(whole, wanted) if wanted < len(whole) else whole


def _reference_card(how: Evaluation, train: ImageSet, held_out: ImageSet) -> dict[str, Any]:
    if how.reference in ("train", "test"):
        return describe_set(_reference(how, train, held_out))
    return {"data": Path(how.reference).stem}


OF_SAMPLING = ("num_steps", "cfg_scale", "guidance_low", "guidance_high", "seed", "weights", "step", "vae")


class _Samples:
    """Where samples come from: the data set they belong to, how to get them, and what the record says of them."""

    def __init__(self, source: Path, how: Evaluation) -> None:
        self.how = how
        if source.suffix == ".npz":
            self._open_file(source)
        else:
            self._open_run(run_folder(source))

    def _open_file(self, file: Path) -> None:
        if (data := self.how.data) is None:
            raise ConfigError(f"{file} does not say what it is compared with: name the data set with --data")
        if asked := [name for name in OF_SAMPLING if getattr(self.how, name) != getattr(Evaluation, name)]:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
            raise ConfigError(f"{file} holds samples that are drawn already: {named} would change nothing")
        images = load_npz(file)
        if len(images) < self.how.num:
            raise ConfigError(f"{file} holds {len(images)} samples: give --num {len(images)}, or fewer")
        if len(images) > self.how.num:  # drawn: the file may be sorted by class
            images = images[torch.randperm(len(images), generator=stream(0, "samples"))[: self.how.num]]
        options: dict[str, Any] = {"data_dir": self.how.data_dir, "size": images.shape[-1]}
        self.real = lambda: (load_images(data, "train", **options), load_images(data, "test", **options))
        self.images = lambda: images
        digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        self.protocol: dict[str, Any] = {"samples": {"file": file.name, "sha256": digest}}

    def _open_run(self, folder: Path) -> None:
        how = self.how
        model, card = load_run(folder, weights=how.weights, step=how.step)
        model = model.to(this_process().device)
        config = card["config"]
        decode = decoder_of(card, device=this_process().device, path=how.vae)
        real = config.changed(data=how.data or config.data, data_dir=how.data_dir or config.data_dir)
        self.real = lambda: load_reference(real, decode)
        settings: dict[str, Any] = {
            "num_steps": how.num_steps,
            "cfg_scale": how.cfg_scale,
            "guidance_low": how.guidance_low,
            "guidance_high": how.guidance_high,
            "first_seed": how.seed,
        }
        labels = balanced_labels(how.num, model.num_classes)
        self.images = lambda: generate(model, labels, objective=config.objective, decode=decode, **settings)
        self.protocol = {
            "run": card["run"],
            "step": card["step"],
            "weights": card["weights"],
            "checkpoint_sha256": weights_sha256(model.state_dict()),
            "training_seed": config.seed,
            "sampler": SAMPLER_NAMES[config.objective],
            "labels": "classes in turn",
            "autoencoder": card["data"].get("autoencoder"),
            "device": this_process().device.type,
            **settings,
        }


def _is_shipped(source: Path) -> bool:
    return run_folder(source) != source


def record_folder(source: Path) -> Path:
    """Where the records go unless told: beside the samples, in the run, or here for a shipped run."""
    return Path() if _is_shipped(source) else source.parent if source.suffix == ".npz" else source


def record_file(source: Path, how: Evaluation, record: Record) -> Path:
    """The file of the records in `record_folder`; one file a setting, none overwritten."""
    name = f"{how.metrics}-{how.extractor}-{how.reference.replace('/', '_')}-N{how.num}"
    if "run" in record.protocol:
        name = f"{record.protocol['step']:08d}-{name}-{record.protocol['sampler']}{how.num_steps}-cfg{how.cfg_scale:g}"
    everything = {key: value for key, value in dataclasses.asdict(how).items() if key not in PLACES}
    mark = hashlib.sha256(repr(everything).encode()).hexdigest()[:6]  # of the settings that the name does not spell out
    return record_folder(source) / f"evaluation-{source.stem}-{name}-{mark}.json"
