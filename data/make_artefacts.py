"""The small files of numbers and pictures that the package ships, made anew: `python data/make_artefacts.py NAME ...`

    classroom   samples and nearest neighbours of the lecture console, 3 minutes on one core
    umap        UMAP pictures of the digits runs, 10 minutes
    cifar10     the analysis of the CIFAR-10 runs, 15 minutes; cifar10 lies in the data folder
    digits      samples that a person reads, of both long arms: notebooks/figures/digits.png
    evidence    the count of all verdicts in README.md, and their picture, notebooks/figures/verdicts.png

Then the list of checksums, `dispersive_kit/artefacts/SHA256SUMS`, is written anew. Without a name it only does that.
Trained runs are made by the commands in their run.json and `dispersive-kit runs export`.
"""

import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dispersive_kit.analysis import (
    LEVELS,
    candidates,
    choose_and_test,
    cka_matrix,
    encoder,
    extract,
    geometry,
    gradient_pull,
    mcnemar,
    noisy,
    projection,
    random_network,
    raw_pixels,
    shuffled,
    sweep,
)
from dispersive_kit.analysis.projection import picture_name
from dispersive_kit.data import ImageSet, load_images, to_uint8
from dispersive_kit.data.files import ARTEFACTS, SUMS, atomic_write, file_sha256, list_folder
from dispersive_kit.evaluation import balanced_labels, draw_images, generate
from dispersive_kit.evaluation.panel import describe_set
from dispersive_kit.models.dit import DiT
from dispersive_kit.study.verdict import all_verdicts, evidence_page
from dispersive_kit.training import load_run, train, train_preset
from dispersive_kit.views.figures import image_grid, style, verdict_forest

Nested = Mapping[str, Any]  # names -> arrays, or again such a mapping
DIGITS = {"base": "digits-base", "paper": "digits-paper"}
CIFAR10 = {"base": "cifar10-cpu-base", "with loss": "cifar10-cpu-paper"}
UMAPS = list(product((5, 15, 50), (0.0, 0.1, 0.5), (0, 1)))  # neighbours, min_dist, seed
STAGES = (100, 200, 400, 600)  # training steps of the AlignedUMAP
SIZES = {"map": 2000, "kept": 400, "noised": 400, "train": 2000, "validation": 500, "test": 1000}  # images of CIFAR-10
BEGIN, END = "<!-- written by: python data/make_artefacts.py evidence -->", "<!-- up to here -->"
DRAWS = 3  # of noise, in its probes and its signal to noise


def model_of(run: str) -> DiT:
    return load_run(run)[0]


def classroom() -> Nested:
    """Samples at scales of guidance, pairs for the quiz, and whom a block takes for neighbours at a level of noise.

    Images that share a place share their noise and their label.
    """
    data, found = load_images("digits", "test").subset(torch.arange(400)), {}
    for arm, run in DIGITS.items():
        levels = extract(encoder(model_of(run)), data.images)  # (1, blocks, N, D) each
        near = torch.stack([torch.stack([nearest(x) for x in level[0]]) for level in levels])
        own = (data.labels[near] == data.labels[:, None]).double().mean((-2, -1))
        found |= {f"agreement/{arm}": own, f"nearest/{arm}": near[:, :, :6].short()}
        found[f"quiz/{arm}"] = samples(run, 1.0, 60)
        for name, prefix in {"digits": "digits", "CIFAR-10": "cifar10-cpu"}.items():
            for scale in (1.0, 1.5, 2.0, 3.0, 5.0):
                found[f"guided/{name}/{arm}/{scale:g}"] = samples(f"{prefix}-{arm}", scale, 20)
    seen = torch.stack([to_uint8(x) for _, _, x, _ in noisy(data.images[:6])])
    return found | {"digits": data.images, "labels": data.labels.byte(), "noisy": seen}


def samples(run: str, scale: float, n: int) -> Tensor:
    """n uint8 images (n, C, H, W) of a shipped run, the classes in turn."""
    model = model_of(run)
    return generate(model, balanced_labels(n, model.num_classes), cfg_scale=scale)


def nearest(x: Tensor, k: int = 5) -> Tensor:
    """Indices (N, k) of the k nearest other rows, the nearest first."""
    x = geometry.centred(x)
    return torch.cdist(x, x).fill_diagonal_(torch.inf).topk(k, largest=False).indices


def umap() -> Nested:
    """Of both arms; of 8 X; of a made-up class drawn together; and AlignedUMAP over the training of a run made here."""
    data = load_images("digits", "test").subset(torch.arange(400))
    features = {arm: last_block(model_of(run), data) for arm, run in DIGITS.items()}
    found = grid_of(features)
    found["umap, 8 X"] = projection.umap(8 * features["base"])
    classes = torch.arange(300) % 6
    wide = 8 * torch.eye(20)[classes] + torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    centre = wide[classes == 0].mean(0)
    shrunk = torch.where(classes[:, None] == 0, centre + 0.1 * (wide - centre), wide)
    for kind, (name, x) in product(("umap", "densmap"), {"wide": wide, "shrunk": shrunk}.items()):
        found[f"{kind}, {name}"] = projection.umap(x, dens=kind == "densmap")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "digits"
        for _ in train(train_preset("digits", checkpoint_every=100, keep_last=6), run):
            pass
        stages = [last_block(load_run(run, step=step)[0], data) for step in STAGES]
    drawn = projection.aligned_umap(stages)
    found |= {f"aligned/{step}": points for step, points in zip(STAGES, drawn, strict=True)}
    found["aligned trust"] = np.array([projection.trustworthiness(x, z) for x, z in zip(stages, drawn, strict=True)])
    return {name: points.astype(np.float16) for name, points in found.items()}


def last_block(model: DiT, data: ImageSet) -> Tensor:
    """All tokens (N, E) at log-SNR 2."""
    return extract(encoder(model), data.images, (2.0,))[0][0, -1]


def grid_of(features: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        picture_name(arm, *one): projection.umap(x, neighbours=one[0], min_dist=one[1], seed=one[2])
        for arm, x in features.items()
        for one in UMAPS
    }


def cifar10() -> Nested:
    """Everything that notebooks 09 to 11 show of the CIFAR-10 runs; pictures in half, else in single precision."""
    train_set, test = (load_images("cifar10", split, download=False) for split in ("train", "test"))
    models = {arm: model_of(run) for arm, run in CIFAR10.items()}
    models["random weights"] = random_network(models["base"])
    shown, kept = draw_images(test, SIZES["map"]), SIZES["kept"]
    sweeps = {arm: sweep(model, shown) for arm, model in models.items()}
    print("map: done", flush=True)
    at = LEVELS.index(2.0)  # of the rows that are kept, and of the pictures
    found: dict[str, Any] = {"labels": shown.labels[:kept], "sweeps": {}}
    for arm, one in sweeps.items():
        fields = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
        found["sweeps"][arm] = {k: v for k, v in fields.items() if k not in ("protocol", "levels", "labels", "rows")}
        if arm in CIFAR10:
            found["sweeps"][arm]["rows"] = one.rows[at, [0, -1], :kept].half()  # of the first and the last block
    pairs = zip(*(sweeps[arm].rows for arm in CIFAR10), strict=True)
    found["between"] = torch.stack([cka_matrix(*pair) for pair in pairs])
    found["signal"] = {arm: signal(models[arm], shown) for arm in CIFAR10}
    found["pulls"] = {arm: dataclasses.asdict(gradient_pull(models[arm], train_set)) for arm in CIFAR10}
    found["probes"] = probes(models, train_set, test)
    found["pictures"] = grid_of({arm: sweeps[arm].rows[at, -1, :kept] for arm in CIFAR10})
    found["protocol"] = json.dumps({arm: one.protocol for arm, one in sweeps.items()})
    arrays = {name: np.asarray(value) for name, value in flat(found).items()}
    halves = {name: np.float16 if name.startswith("pictures") else np.float32 for name in arrays}
    return {k: v.astype(halves[k]) if v.dtype == np.float64 else v for k, v in arrays.items()}


def signal(model: DiT, data: ImageSet) -> Tensor:
    """Between-image over within-noise variance (levels with noise, blocks)."""
    features = extract(encoder(model), data.images[: SIZES["noised"]], LEVELS[1:], draws=DRAWS)
    return torch.stack([torch.stack([geometry.signal_to_noise(z) for z in one.unbind(1)]) for one in features])


def probes(models: Mapping[str, DiT], train_set: ImageSet, test: ImageSet) -> Nested:
    """Validation accuracies (levels, blocks) by probe and arm, and of each arm and control the one test."""
    n, m = SIZES["train"], SIZES["validation"]
    drawn = draw_images(train_set, n + m)
    parts = [drawn.subset(torch.arange(n)), drawn.subset(torch.arange(n, n + m)), draw_images(test, SIZES["test"])]
    encoders = {arm: encoder(model) for arm, model in models.items()}
    encoders["raw pixels"] = raw_pixels(models["base"].patch_size)
    tables: dict[str, dict[str, Tensor]] = {"ridge": {}, "knn": {}}
    results = {}
    for name, encode in encoders.items():
        cells = candidates(encode, parts, draws=DRAWS)
        for kind in tables if name in CIFAR10 else ("ridge",):
            result, accuracy = choose_and_test(kind, cells)
            tables[kind][name] = torch.tensor(list(accuracy.values())).reshape(len(LEVELS), -1)
            results |= {name: result} if kind == "ridge" else {}
        if name == "base":
            at_random = choose_and_test("ridge", {results[name].chosen: shuffled(cells[results[name].chosen])})[0]
        print(f"probe of {name}: done", flush=True)
    results["shuffled labels"] = at_random
    return {
        "tables": tables,
        "tested": {name: [r.accuracy, r.low, r.high, *r.chosen] for name, r in results.items()},
        "mcnemar": mcnemar(*(results[arm].right for arm in CIFAR10)),
        "sets": json.dumps([describe_set(part) for part in parts]),
    }


def evidence() -> None:
    """Between `BEGIN` and `END` of the README; the picture carries the hash of the page that it belongs to."""
    root, said = Path(__file__).parents[1], evidence_page().splitlines()[0]
    figure = f"![{said.replace('*', '')}](notebooks/figures/verdicts.png)"
    text = f"\n{said}\n\n{figure}\n\n[All of them, one by one](notebooks/studies/README.md).\n"
    readme = root / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    style()
    drawn_from = {"Description": hashlib.sha256(evidence_page().encode()).hexdigest()}
    verdict_forest(all_verdicts()).savefig(root / "notebooks" / "figures" / "verdicts.png", metadata=drawn_from)


def digits() -> None:
    """Both long arms from the same noise and labels."""
    style()
    arms = {"without the loss": "digits-long-base", "with the loss": "digits-long-paper"}
    grid = image_grid({arm: samples(run, 1.0, 20) for arm, run in arms.items()}, columns=20, size=0.5)
    grid.savefig(Path(__file__).parents[1] / "notebooks" / "figures" / "digits.png")


def flat(tree: Nested, above: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}"""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{above}{name}/") if isinstance(value, Mapping) else {above + name: value}
    return found


def files_below(folder: Path) -> Iterator[Path]:
    """At any depth; a folder that cannot be listed is an error, and not empty."""
    for path in list_folder(folder):
        yield from files_below(path) if path.is_dir() else [path]


def seal(folder: Path) -> None:
    """List every file of a folder with its sha256."""
    files = sorted(file for file in files_below(folder) if file.name != SUMS)
    lines = [f"{file_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    with atomic_write(folder / SUMS) as partial:
        partial.write_text("".join(lines))
    print(f"{len(files)} files listed in {folder / SUMS}")


MAKERS = {"classroom": classroom, "umap": umap, "cifar10": cifar10}
FILES = {"classroom": "classroom.npz", "umap": "umap-digits.npz", "cifar10": "analysis-cifar10.npz"}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for wanted in sys.argv[1:]:
        if wanted in ("evidence", "digits"):
            {"evidence": evidence, "digits": digits}[wanted]()
        else:
            np.savez_compressed(ARTEFACTS / FILES[wanted], **MAKERS[wanted]())
    seal(ARTEFACTS)
