"""The panel, its records and a whole evaluation; FID is the word for one protocol, and the kit does not lend it."""

import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import run

from dispersive_kit.errors import ConfigError, DataError
from dispersive_kit.evaluation import (
    Evaluation,
    Panel,
    Record,
    draw_images,
    evaluate,
    features,
    frechet_distance,
    measure_memorisation,
    pixel_gaussian,
    table,
    to_json,
)
from dispersive_kit.evaluation.features import INCEPTION, INCEPTION_SHA256, FeatureExtractor
from dispersive_kit.evaluation.panel import METRICS, number_name, record_file, refuse_fid
from dispersive_kit.training import train_preset

module = sys.modules["dispersive_kit.evaluation.panel"]
PANEL = {  # value, low, high, floor of 200 samples of the Gaussian, as ever
    "FD": (1.3517773495585494, 1.195177144397292, 1.49491836931463, 0.8684839580903798),
    "KID": (0.019638376101979826, 0.011690743166414653, 0.028110506866913347, 0.0028174608881670338),
    "precision": (0.68, 0.6124810151086787, 0.7407346672904948, 0.975),
    "recall": (0.638, math.nan, math.nan, 0.97),
    "density": (0.305, 0.2598557854481703, 0.3501442145518297, 0.999),
    "coverage": (0.234, math.nan, math.nan, 0.806),
}
TRUE = {"name": INCEPTION, "weights_sha256": INCEPTION_SHA256}
WHOLE = {"data": "cifar10", "split": "train", "n": 50_000}
FAULTS = {
    "not inception-pool3": ({**TRUE, "name": "effnet-lite0"}, 50_000, WHOLE),
    "inception-pool3/pca64": ({**TRUE, "name": f"{INCEPTION}/pca64"}, 50_000, WHOLE),
    "sha256": ({**TRUE, "weights_sha256": "0" * 64}, 50_000, WHOLE),
    "2,000 images": (TRUE, 2_000, WHOLE),
    "no name": (TRUE, 50_000, {}),
    "2,000 of the 50,000 images of cifar10": (TRUE, 50_000, {**WHOLE, "n": 2_000, "drawn_from": 50_000}),
}
HOW = Evaluation(extractor="pixels-pca32", metrics="FD", num=60, num_steps=2, cfg_scale=2.0)
CHANGES = {"seed": 60, "num_steps": 3, "cfg_scale": 3.0, "num": 50, "reference": "train"}


@pytest.fixture(scope="module")
def panel(digits, space):
    return Panel(space, *digits, resamples=20)


@pytest.fixture(scope="module")
def gaussian(digits, panel):
    return panel.measure(pixel_gaussian(digits[0], 200), protocol={"sampler": "none", "seed": 3})


def test_every_metric_has_its_value_interval_and_floor(gaussian, panel, digits):
    found = {r.name.partition("[")[0]: (r.value, r.low, r.high, r.floor) for r in gaussian}
    assert found.keys() == PANEL.keys() and gaussian[0].name == "FD[pixels/pca32, N=200]"
    for name, values in PANEL.items():
        assert found[name] == pytest.approx(values, rel=1e-5, nan_ok=True), name
    for record in gaussian:
        assert not (record.low > record.value or record.value > record.high) and math.isfinite(record.floor)
        worse = record.value < record.floor if record.better == "higher" else record.value > record.floor
        assert worse, record.name
    for record in panel.measure(draw_images(digits[0], 200).images):  # real images measure as their own floor
        assert record.value == pytest.approx(record.floor)


def test_the_floor_of_a_set_sorted_by_class_is_that_of_all_classes(digits, space, gaussian):
    train, test = digits
    ordered = train.subset(train.labels.argsort(stable=True))
    (record,) = Panel(space, ordered, test, metrics=("FD",), resamples=0).measure(pixel_gaussian(train, 200))
    one_class = frechet_distance(space(ordered.images[:120]), space(test.images))
    assert record.floor == pytest.approx(gaussian[0].floor, rel=0.3) and record.floor < one_class / 5


def test_fewer_real_images_than_generated_ones_are_said_beside_the_floor(digits, space, gaussian):
    train, test = digits
    (record,) = Panel(space, test, train, metrics=("FD",), resamples=5).measure(pixel_gaussian(train, 600))
    assert record.protocol["floor"]["n"] == 500
    assert "(N=500)" in table([record]) and "(N=" not in table(gaussian)
    assert str(record).startswith(f"{record.name} = ") and str(record).endswith("(N=500)")  # as notebook 08 shows it


def test_the_record_says_all_that_is_needed_to_measure_again(gaussian, digits, space):
    protocol, floor = gaussian[0].protocol, draw_images(digits[0], 200)
    assert protocol["reference"] == {
        "data": "digits", "split": "test", "n": 500, "sha256": digits[1].sha256, "resize": "none",
    }  # fmt: skip
    assert protocol["floor"] == {
        "data": "digits", "split": "train", "n": 200, "sha256": floor.sha256, "resize": "none", "drawn_from": 1297
    }  # fmt: skip
    assert protocol["extractor"]["name"] == space.name and "sha256" in protocol["extractor"]["note"]
    assert protocol["uint8_rule"].startswith("round") and "20 half-samples" in protocol["interval"]
    assert {"python", "torch", "numpy", "scipy", "dispersive-kit"} <= set(protocol["versions"])
    assert protocol["sampler"] == "none"


def test_the_table_has_one_line_a_number_and_an_unknown_metric_is_refused(gaussian, digits, space):
    with pytest.raises(ConfigError, match=", ".join(METRICS)):
        Panel(space, *digits, metrics=("FID",))
    lines = table(gaussian).splitlines()
    assert len(lines) == 1 + len(gaussian) and lines[0].split() == ["value", "95", "%", "interval", "real", "better"]
    for line, record in zip(lines[1:], gaussian, strict=True):
        assert line.startswith(record.name) and line.endswith(record.better) and f"{record.value:.4g}" in line


def test_the_json_says_once_what_numbers_share_and_beside_a_number_what_is_its_own(gaussian, digits, space):
    nearest = measure_memorisation(digits[1].images[:100], *digits, space).ratio
    read = json.loads(to_json([*gaussian, nearest]))
    assert read["protocol"]["seed"] == 3 and read["numbers"][0]["name"] == gaussian[0].name
    *panel, own = read["numbers"]
    assert all("protocol" not in number for number in panel) and own["protocol"]["reference"]["split"] == "train"
    assert own["protocol"]["floor"]["n"] == 500 and "extractor" not in own["protocol"]


def test_copies_of_training_images_are_found_and_fresh_ones_are_not(digits, space):
    train, held_out = digits
    noise = torch.randint(-3, 4, (200, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    copied = (train.images[:200] + noise).clamp(0, 255).to(torch.uint8)
    ratio, copies, _, index = measure_memorisation(copied, train, held_out, space)
    assert ratio.value < 0.2 and copies.value == 1 and copies.low > 0.98 and index.tolist() == list(range(200))
    fresh, half = held_out.subset(torch.arange(0, 500, 2)), held_out.subset(torch.arange(1, 500, 2))
    other = measure_memorisation(fresh.images, train, half, space)
    assert other.ratio.low < 1 < other.ratio.high and other.ratio.floor == pytest.approx(1, abs=0.15)
    assert other.copies.value < 0.05 and other.copies.low <= other.copies.floor <= other.copies.high
    mixed = measure_memorisation(torch.cat([copied[:50], fresh.images[:200]]), train, half, space)
    assert mixed.copies.value == pytest.approx(0.2, abs=0.02) and mixed.ratio.value > 0.8  # the share sees it first
    known = space(train.images)
    by_hand = np.array([np.linalg.norm(known - row, axis=1).min() for row in space(half.images)])
    assert other.copies.floor == (by_hand < by_hand.mean() / 2).mean()
    with pytest.raises(ConfigError, match="do not overlap"):
        measure_memorisation(copied, train, train, space)


def measured(source="digits-base", **changes):
    return evaluate(Path(source), dataclasses.replace(HOW, **changes))


@pytest.fixture(scope="module")
def plain():
    return measured(memorisation=True)


def test_an_evaluation_is_the_same_number_when_it_is_measured_again(plain, classifier):
    names = [record.name.partition("[") for record in plain]
    assert repr(measured()) == repr(plain[:1]) and [name for name, *_ in names] == ["FD", "nearest-train", "copies"]
    records = measured(extractor="classifier", num_steps=3, cfg_scale=1.5, memorisation=True)
    values = [(r.value, r.low, r.high, r.floor) for r in records]
    assert records[0].protocol["extractor"] == classifier.card()  # trained twice
    # Two kinds of processor round differently, and 400 steps of training make one per cent of that.
    assert values[0] == pytest.approx((14.805401630, 7.679884135, 25.798333497, 11.246750110), rel=0.05)
    assert values[1] == pytest.approx((1.134692955, 1.082648297, 1.211797473, 0.988820911), rel=0.05)


@pytest.mark.parametrize("option", [*CHANGES, "arm"])
def test_whatever_moves_the_number_stands_in_its_record_and_has_a_file_of_its_own(plain, option):
    changes = {option: CHANGES[option]} if option in CHANGES else {"source": "digits-paper"}
    (changed,) = measured(**changes)
    assert changed.value != plain[0].value
    assert (changed.name, changed.protocol) != (plain[0].name, plain[0].protocol)
    source, usual = Path(changes.pop("source", "digits-base")), record_file(Path("digits-base"), HOW, plain[0])
    assert record_file(source, dataclasses.replace(HOW, **changes), changed) != usual
    assert changed.protocol["checkpoint_sha256"] and changed.protocol["device"] == "cpu"


def test_copies_are_looked_for_among_the_images_that_the_run_was_trained_on(tmp_path, monkeypatch):
    run(train_preset("smoke", data_share=0.1, steps=1, model="DiT-T/4"), tmp_path / "tenth")
    monkeypatch.chdir(tmp_path / "tenth")
    copies = measured(".", memorisation=True)[-1]
    assert copies.n_reference == 130 and (copies.protocol["run"], copies.protocol["data_share"]) == ("tenth", 0.1)
    assert record_file(Path(), HOW, copies).name.startswith("evaluation-tenth-")
    (file := Path("run.json")).write_text(file.read_text().replace(copies.protocol["training_data_sha256"], "0" * 64))
    with pytest.raises(DataError, match="not what the run was trained on"):
        measured(".", memorisation=True)


@pytest.fixture(scope="module")
def statistics(digits, space, tmp_path_factory):
    """Those of the held-out digits, in the form of ADM's files."""
    features, file = space(digits[1].images), tmp_path_factory.mktemp("statistics") / "held-out.npz"
    np.savez(file, mu=features.mean(0, dtype=float), sigma=np.cov(features.T), mu_s=np.zeros(3), sigma_s=np.eye(3))
    return file


def test_a_file_of_statistics_gives_the_frechet_distance_alone_and_names_itself(plain, statistics, tmp_path):
    records = measured(reference=str(statistics), metrics="panel")
    digest = hashlib.sha256(statistics.read_bytes()).hexdigest()
    assert [r.name for r in records] == [f"FD[pixels/pca32, reference held-out.npz sha256 {digest[:12]}, N=60]"]
    found, usual = ((r.value, r.low, r.high) for r in (records[0], plain[0]))
    assert found == pytest.approx(usual, rel=1e-6)
    assert math.isnan(records[0].floor) and " none" in table(records) and json.loads(to_json(records))
    assert records[0].protocol["reference"]["sha256"] == digest and "none" in records[0].protocol["floor"]
    for changes, said in (
        ({"memorisation": True}, "give --reference test"),
        ({"metrics": "FID"}, "held-out.npz is not the name of a statistics file of ADM"),
        ({"extractor": "classifier"}, "digits-classifier48 has 48 features, and held-out.npz 32"),
    ):
        with pytest.raises(ConfigError, match=said):
            measured(reference=str(statistics), **changes)


def test_features_of_inception_need_no_real_images_beside_a_file_of_statistics(statistics, tmp_path, monkeypatch):
    zeros = FeatureExtractor("untrained", "1", 32, "none", lambda images: torch.zeros(len(images), 32))
    asked = []
    monkeypatch.setattr(features, "inception_pool3", lambda device: asked.append(device) or zeros)
    np.savez(tmp_path / "samples.npz", np.zeros((8, 6, 6, 3), np.uint8))  # of no data set, and none is named
    (record,) = evaluate(tmp_path / "samples.npz", Evaluation("inception", num=8, reference=str(statistics)))
    assert asked and record.n == 8 and record.protocol["extractor"]["name"] == "untrained"


def test_of_a_file_sorted_by_class_all_classes_are_measured(digits, tmp_path):
    train, _ = digits
    images = train.images[train.labels.argsort(stable=True)]
    np.savez(tmp_path / "sorted.npz", images.permute(0, 2, 3, 1).numpy())
    (record,) = evaluate(tmp_path / "sorted.npz", Evaluation("pixels-pca32", "FD", data="digits", num=100))
    assert record.value == pytest.approx(record.floor, rel=0.4)  # real images, as far as the floor's
    assert record.n == 100


def test_files_without_samples_are_refused_by_name(tmp_path):
    (file := tmp_path / "other.npz").write_text("no archive")
    for arrays, words in [
        ({}, "other.npz holds no samples"),
        ({"mu": np.zeros(3)}, "other.npz holds no samples"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "float32"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"\(2, 3, 4, 4\)"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, "N, H, W, 1 or 3"),
    ]:
        if arrays:
            np.savez(file, **arrays)
        with pytest.raises(DataError, match=words):
            evaluate(file, Evaluation(data="digits"))


def test_a_flipped_bit_of_a_compressed_archive_is_refused(tmp_path):
    images = np.random.default_rng(0).integers(0, 4, (50, 8, 8, 1), np.uint8)
    np.savez_compressed(file := tmp_path / "samples.npz", arr_0=images)
    file.write_bytes(bytes(b ^ 255 if i == 300 else b for i, b in enumerate(file.read_bytes())))
    with pytest.raises(DataError, match="holds no samples"):
        evaluate(file, Evaluation(data="digits", num=50))


@pytest.mark.parametrize("words", FAULTS)
def test_fid_is_refused_with_the_condition_that_fails(words):
    with pytest.raises(ConfigError, match=f"this is not FID: .*{words}"):
        refuse_fid(*FAULTS[words])
    assert number_name("FD", *FAULTS[words]).startswith("FD[")


def test_a_record_cannot_be_given_the_word():
    extractor = {"name": "digits-classifier48", "weights_sha256": "0" * 64}
    with pytest.raises(ConfigError, match=r"this is not FID: .*digits-classifier48.*500 images"):
        Record("FID[digits]", 3.0, 2.0, 4.0, 1.0, 500, 500, {"extractor": extractor})
    with pytest.raises(ConfigError, match="this is not FID"):
        Record("FID", 3.0, 2.0, 4.0, 1.0, 50_000, 500)


def test_where_every_condition_holds_the_word_is_used():
    assert number_name("FD", TRUE, 50_000, {"data": "imagenet256"}) == "FID[imagenet256, N=50000]"
    assert number_name("FD", TRUE, 50_000, WHOLE) == "FID[cifar10 train, N=50000]"
    protocol = {"extractor": TRUE, "reference": {"data": "imagenet256"}}
    assert Record("FID[imagenet256, N=50000]", 3.0, 2.9, 3.1, 1.0, 50_000, 50_000, protocol).value == 3
    assert number_name("KID", TRUE, 50_000, WHOLE) == "KID[inception-pool3, N=50000]"
    adm = {"data": "x", "file": "VIRTUAL_imagenet256_labeled.npz", "sha256": "0123456789abcdef"}
    said = "reference VIRTUAL_imagenet256_labeled.npz sha256 0123456789ab, N=50000]"
    assert number_name("FD", TRUE, 50_000, adm) == f"FID[{said}"
    own = {**adm, "file": "my_statistics.npz"}
    assert number_name("FD", TRUE, 50_000, own).startswith("FD[inception-pool3, reference my_statistics.npz")
