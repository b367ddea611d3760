"""The shipped CIFAR-10 runs, analysed: notebooks may not download 170 MB of images, so the numbers are in the package.

`python -m dispersive_kit.analysis.cifar10 DATA_DIR` makes the file anew; cifar10 lies in DATA_DIR. A quarter of an hour
on one core; `dispersive-kit artefacts seal` then lists it. Beside each number stand the hashes of the weights and of
the images it was measured on.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dispersive_kit.analysis import dispersion, projection
from dispersive_kit.analysis.controls import patch_pca, raw_pixels
from dispersive_kit.analysis.features import LEVELS, Encoder, extract, pooled, random_network
from dispersive_kit.analysis.gradients import Pull, gradient_pull
from dispersive_kit.analysis.probes import Result, candidates, choose_and_test, mcnemar, shuffled
from dispersive_kit.analysis.similarity import cka_matrix
from dispersive_kit.analysis.sweep import Sweep, sweep
from dispersive_kit.analysis.umap_grid import MIN_DIST, NEIGHBOURS, SEEDS, name_of
from dispersive_kit.data import ImageSet, load_images
from dispersive_kit.data.artefacts import FOLDER, artefact
from dispersive_kit.evaluation import draw_images, weights_sha256
from dispersive_kit.evaluation.record import describe_set
from dispersive_kit.models.dit import DiT
from dispersive_kit.training import load_run
from dispersive_kit.training.shipped import shipped

FILE = "analysis-cifar10.npz"
ARMS = {"base": "cifar10-cpu-base", "with loss": "cifar10-cpu-paper"}
RANDOM = "random weights"
LEVEL = 2  # log-SNR 2: of the rows that are kept, and of the pictures
IMAGES, KEPT, NOISED = 2000, 400, 400  # test images: in the map; rows kept and drawn; under three draws of noise
TRAIN, VALIDATION, TEST, DRAWS = 2000, 500, 1000, 3  # images of the probes, and draws of noise of each
PATCH_COMPONENTS = 16

Nested = Mapping[str, Any]  # names -> arrays, or again such a mapping


def make(data_dir: Path) -> dict[str, Any]:
    """Everything, as nested mappings of arrays; see `load`."""
    train, test = (load_images("cifar10", split, data_dir=data_dir, download=False) for split in ("train", "test"))
    models = {arm: load_run(shipped(run))[0] for arm, run in ARMS.items()}
    models[RANDOM] = random_network(models["base"])
    shown = draw_images(test, IMAGES)
    sweeps = {arm: sweep(model, shown) for arm, model in models.items()}
    report("map")
    found = {"sweeps": {arm: _kept(one) for arm, one in sweeps.items()}, "labels": shown.labels[:KEPT]}
    found["between"] = torch.stack([_between(sweeps, level) for level in range(len(LEVELS))])
    found["signal"] = {arm: _signal(models[arm], shown) for arm in ARMS}
    found["pulls"] = {arm: dataclasses.asdict(gradient_pull(models[arm], train)) for arm in ARMS}
    report("noise and gradients")
    found |= _probes(models, train, test)
    report("probes")
    found["pictures"] = {
        name_of(arm, k, near, seed): projection.umap(
            sweeps[arm].rows[LEVEL, -1, :KEPT], neighbours=k, min_dist=near, seed=seed
        )
        for arm in ARMS for k in NEIGHBOURS for near in MIN_DIST for seed in SEEDS
    }  # fmt: skip
    found["protocol"] = json.dumps({arm: one.protocol for arm, one in sweeps.items()})
    return found


def _kept(one: Sweep) -> dict[str, Any]:
    """The sweep without its protocol, and of the rows those at one level."""
    fields = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    rows = one.rows[LEVEL, :, :KEPT].half()  # (blocks, KEPT, D)
    return {name: value for name, value in fields.items() if name not in ("protocol", "levels", "labels")} | {
        "rows": rows
    }


def _between(sweeps: Mapping[str, Sweep], level: int) -> Tensor:
    return cka_matrix(*(sweeps[arm].rows[level] for arm in ARMS))  # (blocks, blocks)


def _signal(model: DiT, data: ImageSet) -> Tensor:
    """Between-image over within-noise variance (levels, blocks), of the levels with noise."""
    features = extract(pooled(model), data.images[:NOISED], LEVELS[1:], draws=DRAWS)
    return torch.stack([torch.stack([dispersion.signal_to_noise(z) for z in one.unbind(1)]) for one in features])


def _probes(models: Mapping[str, DiT], train: ImageSet, test: ImageSet) -> dict[str, Any]:
    """Validation accuracies by (probe, arm), and of each arm and control the one test."""
    drawn = draw_images(train, TRAIN + VALIDATION)
    parts = [drawn.subset(torch.arange(TRAIN)), drawn.subset(torch.arange(TRAIN, TRAIN + VALIDATION))]
    parts.append(draw_images(test, TEST))
    encoders: dict[str, Encoder] = {arm: pooled(model) for arm, model in models.items()}
    encoders |= {"raw pixels": raw_pixels, "patch PCA": patch_pca(parts[0].images, 4, PATCH_COMPONENTS)}
    tables: dict[str, dict[str, Tensor]] = {"ridge": {}, "knn": {}}
    results: dict[str, Result] = {}
    for name, encode in encoders.items():
        cells = candidates(encode, parts, draws=DRAWS)
        for kind in tables if name in ARMS else ["ridge"]:
            result, accuracy = choose_and_test(kind, cells)
            tables[kind][name] = torch.tensor(list(accuracy.values())).reshape(len(LEVELS), -1)
            results |= {name: result} if kind == "ridge" else {}
        if name == "base":
            shuffling = choose_and_test("ridge", {results[name].chosen: shuffled(cells[results[name].chosen])})[0]
        report(f"probe of {name}")
    results["shuffled labels"] = shuffling
    tested = {name: [r.accuracy, r.low, r.high, *r.chosen] for name, r in results.items()}
    p = mcnemar(*(results[arm].right for arm in ARMS))
    sets = json.dumps([describe_set(part) for part in parts])
    return {"probes": {"tables": tables, "tested": tested, "mcnemar": p, "sets": sets}}


def report(what: str) -> None:
    print(f"{what}: done", flush=True)


@dataclasses.dataclass(frozen=True)
class Tested:
    """One test accuracy with its 95 % interval, and the (level, block) that validation chose."""

    accuracy: float
    low: float
    high: float
    level: float
    block: float


@dataclasses.dataclass(frozen=True)
class Shipped:
    """What the file holds. Names of arms are those of `ARMS`, and "random weights".

    sweeps: of 2,000 test images; `rows` is (blocks, 400, D) at log-SNR 2, with `labels`. between: CKA of the blocks of
    the two arms (levels, blocks, blocks). signal: (levels with noise, blocks). tables: validation accuracy
    (levels, blocks) by probe and name. tested: by name. pictures: UMAP (400, 2) of the last block's rows, by `name_of`.
    """

    sweeps: dict[str, Sweep]
    labels: Tensor
    between: Tensor
    signal: dict[str, Tensor]
    pulls: dict[str, Pull]
    tables: dict[str, dict[str, Tensor]]
    tested: dict[str, Tested]
    mcnemar: float
    pictures: dict[str, projection.Array]


def load(path: Path | None = None) -> Shipped:
    """The analysis that comes with the package, or one that `save` wrote.

    Raises:
        DataError: the shipped file is missing, or not the one that was listed.
    """
    with np.load(path or artefact(FILE), allow_pickle=False) as arrays:
        found: Any = nested({name: arrays[name] for name in arrays.files})
    protocol, labels, probes = json.loads(str(found["protocol"])), torch.from_numpy(found["labels"]), found["probes"]
    return Shipped(
        sweeps={
            arm: Sweep(levels=LEVELS, labels=labels, protocol=protocol[arm], **as_tensors(one))
            for arm, one in found["sweeps"].items()
        },
        labels=labels,
        between=torch.from_numpy(found["between"]),
        signal=as_tensors(found["signal"]),
        pulls={arm: Pull(**as_tensors(one)) for arm, one in found["pulls"].items()},
        tables=as_tensors(probes["tables"]),
        tested={name: Tested(*map(float, values)) for name, values in probes["tested"].items()},
        mcnemar=float(probes["mcnemar"]),
        pictures={name: points.astype(np.float64) for name, points in flat(found.get("pictures", {})).items()},
    )


def weights_here() -> dict[str, str]:
    """Hash of each arm's weights as they are in the package now: those the numbers were measured on?"""
    return {arm: weights_sha256(load_run(shipped(run))[0].state_dict()) for arm, run in ARMS.items()}


def flat(tree: Nested, above: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}"""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{above}{name}/") if isinstance(value, Mapping) else {above + name: value}
    return found


def nested(arrays: Nested) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for path, value in arrays.items():
        *above, name = path.split("/")
        place = tree
        for step in above:
            place = place.setdefault(step, {})
        place[name] = value
    return tree


def as_tensors(tree: Nested) -> Any:
    return {k: as_tensors(v) if isinstance(v, Mapping) else torch.from_numpy(v).double() for k, v in tree.items()}


def save(found: Nested, path: Path) -> None:
    """Write what `make` found, pictures in half and other numbers in single precision."""
    arrays = {name: np.asarray(value) for name, value in flat(found).items()}
    for name, array in arrays.items():
        if array.dtype == np.float64:
            arrays[name] = array.astype(np.float16 if name.startswith("pictures") else np.float32)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    torch.set_num_threads(1)
    save(make(Path(sys.argv[1])), FOLDER / FILE)
