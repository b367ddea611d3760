"""What is measured of one run of a study, always at its last step: never the best of several checkpoints."""

import statistics
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from dispersive_kit.analysis.dispersion import rankme, spectrum
from dispersive_kit.analysis.features import LEVELS, extract, pooled
from dispersive_kit.analysis.probes import candidates, choose_and_test
from dispersive_kit.errors import KitError
from dispersive_kit.evaluation import balanced_labels, draw_images, generate
from dispersive_kit.evaluation.features import make_extractor
from dispersive_kit.evaluation.panel import Panel
from dispersive_kit.evaluation.processes import this_process
from dispersive_kit.evaluation.reference import load_reference
from dispersive_kit.regularizers import PRESETS
from dispersive_kit.regularizers.taps import block_at
from dispersive_kit.study.arms import read_metrics
from dispersive_kit.study.plan import Sampling
from dispersive_kit.training import TrainConfig, load_run
from dispersive_kit.training.run import build_objective
from dispersive_kit.training.sampling import SAMPLER_NAMES

PROBED, VALIDATED, TESTED, DRAWS = 1000, 300, 500, 3  # images of a linear probe, and draws of noise
DESCRIBED = ("feature_rms", "gap", "dispersive")  # of the last step's batch, where they are finite


def measure_run(run: Path, config: TrainConfig, how: Sampling) -> dict[str, Any]:
    """Values by name, numbers that describe without being judged, and the record of how they came about.

    Raises:
        KitError: the run has no whole checkpoint, its data is missing, or its held-out loss is not finite.
    """
    model, card = load_run(run)
    lines = read_metrics(run)
    last = lines[-1]
    if "held_out" not in last:
        raise KitError("the held-out loss of the last step is not finite")
    probe = {"probe": _probe_accuracy(model, config)} if how.probe else {}
    rank = {} if model.null_label is None else {"pooled_rank": measure_pooled_rank(model, config)}
    model = model.to(this_process().device)
    panel = _panel(config.data, config.data_dir, config.image_size, how.extractor)
    labels = balanced_labels(how.num, model.num_classes)
    values: dict[str, float] = {}
    records = []
    for name, scale in how.frechets.items():
        images = generate(model, labels, objective=config.objective, num_steps=how.num_steps, cfg_scale=scale)
        record = panel.measure(images)[0]
        values[name] = record.value
        records.append(record)
    values |= {"held_out": last["held_out"], **probe}
    ratios = [line["gradient_ratio"] for line in lines if "gradient_ratio" in line]
    bins = {name: value for name, value in last.items() if name.startswith("held_out_t")}
    known = {name: last[name] for name in DESCRIBED if name in last}
    described = {"gradient_ratio": statistics.median(ratios), **bins, **known, **rank}
    return {"values": values, "described": described, "record": _record(records[0], card, config, how)}


@lru_cache(maxsize=1)
def _panel(data: str, data_dir: str | None, image_size: int, extractor: str) -> Panel:
    """The real images and their features, once a process."""
    train, held_out = load_reference(TrainConfig(data=data, data_dir=data_dir, image_size=image_size))
    return Panel(make_extractor(extractor, train, held_out), train, held_out, metrics=("FD",))


def _record(number: Any, card: dict[str, Any], config: TrainConfig, how: Sampling) -> dict[str, Any]:
    protocol = {k: v for k, v in number.protocol.items() if k not in ("neighbours", "projections", "rbf_bandwidth")}
    sampler = {"sampler": SAMPLER_NAMES[config.objective], "num_steps": how.num_steps, "cfg_scale": how.cfg_scales[0]}
    shared = {**sampler, "weights": card["weights"], "step": card["step"], "first_seed": 0, "labels": "classes in turn"}
    data = {"data": card["data"]["name"], "data_sha256": card["data"]["sha256"]}
    return {
        "name": number.name,
        "floor_value": number.floor,
        "n_reference": number.n_reference,
        **protocol,
        **shared,
        **data,
    }


def measure_pooled_rank(model: Any, config: TrainConfig) -> float:
    """RankMe of the mean tokens of clean held-out images after the block that the published settings tap.

    The effective rank in the training log is of the rows that the arm's loss saw: 64 of as many channels as its pooling
    leaves. This one is of the same images, block and pooling whatever the arm, so that arms may be compared.
    """
    images = draw_images(load_reference(config)[1], TESTED).images
    (features,) = extract(pooled(model), images, LEVELS[:1])  # (1, blocks, N, D)
    tapped = block_at(dict(model.named_modules()), PRESETS["paper"]["depth"])
    return float(rankme(spectrum(features[0, int(tapped.rpartition(".")[2])])))


def _probe_accuracy(model: Any, config: TrainConfig) -> float:
    """Test accuracy of the ridge probe whose block and noise level validation images chose, on the null class."""
    train, held_out = load_reference(config)
    known = draw_images(train, PROBED + VALIDATED)
    cut = min(PROBED, len(known) * PROBED // (PROBED + VALIDATED))
    index = torch.arange(len(known))
    parts = [known.subset(index[:cut]), known.subset(index[cut:]), draw_images(held_out, TESTED)]
    cells = candidates(pooled(model), parts, draws=DRAWS, path=build_objective(config).path)
    return choose_and_test("ridge", cells)[0].accuracy
