import json
import math

import numpy as np
import pytest
import torch

from dispersive_kit.data import load_images
from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation import (
    Moments,
    Panel,
    draw_images,
    frechet_distance,
    measure_frechet,
    measure_memorisation,
    pca,
    pixels,
)
from dispersive_kit.evaluation import features as features_module
from dispersive_kit.evaluation.baselines import pixel_gaussian
from dispersive_kit.evaluation.distances import half_samples, wilson
from dispersive_kit.evaluation.features import random_convolutions
from dispersive_kit.evaluation.moments import save_statistics
from dispersive_kit.evaluation.panel import METRICS, Features, Pair, _ends, measure_against_statistics
from dispersive_kit.evaluation.record import table, to_json

NAMES = ["FD", "KID", "MMD-RBF", "energy", "sliced-W2", "precision", "recall", "density", "coverage"]


@pytest.fixture(scope="module")
def digits():
    return load_images("digits"), load_images("digits", "test")


@pytest.fixture(scope="module")
def extractor(digits):
    return pca(pixels(digits[0].images), digits[0].images, 16)


@pytest.fixture(scope="module")
def panel(digits, extractor):
    return Panel(extractor, *digits, resamples=30)


@pytest.fixture(scope="module")
def gaussian(digits, panel):
    return panel.measure(pixel_gaussian(digits[0], 200), protocol={"sampler": "none", "seed": 3})


def test_a_number_carries_its_name_interval_floor_and_record(digits, extractor):
    train, test = digits
    record = measure_frechet(pixel_gaussian(train, 200), train, test, extractor, protocol={"seed": 3})
    read = json.loads(record.to_json())
    assert read["name"] == "FD[pixels/pca16, N=200]" and "FID" not in str(record)
    assert read["low"] < read["value"] < read["high"] and read["floor"] > 0
    assert read["protocol"]["reference"]["sha256"] == test.sha256 and read["protocol"]["seed"] == 3


def test_the_panel_has_every_metric_with_interval_and_floor(gaussian):
    assert [r.name.partition("[")[0] for r in gaussian] == NAMES
    for record in gaussian:
        assert record.low <= record.value <= record.high and math.isfinite(record.floor)


def test_real_images_measure_as_their_own_floor(digits, panel):
    for record in panel.measure(draw_images(digits[0], 200).images):
        assert record.value == pytest.approx(record.floor)


def by_class(data):
    return data.subset(data.labels.argsort(stable=True))


def test_the_floor_of_a_set_sorted_by_class_is_that_of_all_classes(digits, extractor, gaussian):
    train, test = digits
    panel = Panel(extractor, by_class(train), test, metrics=("FD",), resamples=0)
    (record,) = panel.measure(pixel_gaussian(train, 200))
    one_class = frechet_distance(extractor(by_class(train).images[:120]), extractor(test.images))
    assert record.floor == pytest.approx(gaussian[0].floor, rel=0.3) and record.floor < one_class / 5


def test_fewer_real_images_than_generated_ones_are_said_beside_the_floor(digits, extractor, gaussian):
    train, test = digits
    panel = Panel(extractor, test, train, metrics=("FD",), resamples=5)
    (record,) = panel.measure(pixel_gaussian(train, 600))
    assert record.protocol["floor"]["n"] == 500
    assert str(record).endswith("(N=500)") and "(N=500)" in table([record])
    assert "(N=" not in str(gaussian[0])


def test_a_gaussian_of_pixels_is_worse_than_real_by_every_metric_but_recall(gaussian):
    for record in gaussian:
        if record.name.startswith("recall"):  # a wide cloud covers the real points without looking like them
            continue
        worse = record.value < record.floor if record.better == "higher" else record.value > record.floor
        assert worse, record.name


def clouds(seed):
    """200 features in four dimensions, a little off the reference's."""
    return np.random.default_rng(seed).normal(0.4, 1, (200, 4))


def test_every_interval_has_the_width_of_repeated_sampling():
    y, none = np.random.default_rng(99).normal(size=(300, 4)), half_samples(200, 0)
    logits = np.random.default_rng(5).normal(size=(4, 10))

    def measured(x, halves):
        pair = Pair(Features(x, 3 * x @ logits), Features(y, y @ logits), halves)
        return {k: v for metric in METRICS.values() for k, v in metric(pair).items()}

    fresh = [measured(clouds(seed), none) for seed in range(100)]
    kept = [measured(clouds(1000 + seed), half_samples(200, 60)) for seed in range(5)]
    for name in fresh[0]:
        low, high = np.percentile([one[name][0] for one in fresh], [2.5, 97.5])
        ends = [_ends(name, *one[name], 200) for one in kept]
        assert 0.65 < np.mean([b - a for a, b in ends]) / (high - low) < 1.5, name


def test_shares_end_at_zero_and_one_and_a_full_precision_is_not_certain():
    assert _ends("precision", 1.0, np.ones(50), 200) == wilson(1.0, 200) and wilson(1.0, 200)[0] < 0.99
    assert _ends("coverage", 0.99, np.array([0.9, 0.95, 0.99]), 200)[1] == 1.0


def test_the_record_says_all_that_is_needed_to_measure_again(gaussian, digits, extractor):
    protocol = gaussian[0].protocol
    assert protocol["reference"] == {
        "data": "digits", "split": "test", "n": 500, "sha256": digits[1].sha256, "resize": "none",
    }  # fmt: skip
    floor = draw_images(digits[0], 200)
    assert protocol["floor"] == {
        "data": "digits", "split": "train", "n": 200, "sha256": floor.sha256, "resize": "none", "drawn_from": 1297
    }  # fmt: skip
    assert protocol["extractor"]["name"] == extractor.name and "sha256" in protocol["extractor"]["note"]
    assert protocol["uint8_rule"].startswith("round") and "30 half-samples" in protocol["interval"]
    assert {"python", "torch", "numpy", "scipy", "dispersive-kit"} <= set(protocol["versions"])
    assert protocol["sampler"] == "none" and protocol["rbf_bandwidth"] > 0


def test_the_classifier_score_is_there_where_the_extractor_classifies(digits, extractor):
    def scores(head):
        one = features_module.replace(extractor, head=head)
        return Panel(one, *digits, metrics=("CS",), resamples=5).measure(digits[1].images[:50])

    (score,) = scores(lambda base: base[:, :10])
    assert score.name == "CS[pixels/pca16, N=50]" and score.better == "higher" and 1 < score.value < 10
    assert scores(None) == []


def test_the_same_number_comes_from_batches_of_any_size(digits):
    extractor, images = random_convolutions(1), digits[1].images
    whole, parts = (Features.of(extractor, images, batch_size=size).values for size in (500, 37))
    real = extractor(digits[0].images)
    assert frechet_distance(parts, real) == pytest.approx(frechet_distance(whole, real), rel=1e-5)


def test_a_distance_to_statistics_is_the_one_to_the_images_they_are_of(digits, extractor, tmp_path):
    train, test = digits
    save_statistics(tmp_path / "digits-test.npz", Moments.of(extractor(test.images)))
    images = pixel_gaussian(train, 200)
    record = measure_against_statistics(images, train, tmp_path / "digits-test.npz", extractor)
    expected = measure_frechet(images, train, test, extractor)
    assert (record.value, record.floor) == pytest.approx((expected.value, expected.floor), rel=1e-6)
    assert record.low < record.value < record.high and record.protocol["reference"]["data"] == "digits-test"


def test_statistics_of_another_extractor_are_refused(digits, extractor, tmp_path):
    save_statistics(tmp_path / "wide.npz", Moments.of(np.random.default_rng(0).normal(size=(50, 20))))
    with pytest.raises(ConfigError, match="one extractor"):
        measure_against_statistics(digits[1].images, digits[0], tmp_path / "wide.npz", extractor)


def test_the_table_has_one_line_a_number(gaussian):
    lines = table(gaussian).splitlines()
    assert len(lines) == 1 + len(gaussian) and lines[0].split() == ["value", "95", "%", "interval", "real", "better"]
    for line, record in zip(lines[1:], gaussian, strict=True):
        assert line.startswith(record.name) and line.endswith(record.better) and f"{record.value:.4g}" in line


def test_the_json_of_many_numbers_says_what_they_share_once(gaussian):
    read = json.loads(to_json(gaussian))
    assert read["protocol"]["seed"] == 3 and len(read["numbers"]) == len(gaussian)
    assert read["numbers"][0]["name"] == gaussian[0].name and "protocol" not in read["numbers"][0]


def test_a_number_with_another_reference_keeps_its_own_protocol_in_the_json(gaussian, digits, extractor):
    other, _ = measure_memorisation(digits[1].images[:100], *digits, extractor, resamples=5)
    panel, nearest = json.loads(to_json([gaussian[0], other]))["numbers"]
    assert "protocol" not in panel and nearest["protocol"]["reference"]["split"] == "train"
    assert nearest["protocol"]["floor"]["n"] == 500 and "extractor" not in nearest["protocol"]


def test_an_unknown_metric_names_those_there_are(digits, extractor):
    with pytest.raises(ConfigError, match=", ".join(METRICS)):
        Panel(extractor, *digits, metrics=("FID",))


def test_the_gaussian_has_the_moments_of_the_pixels(digits):
    train, _ = digits
    drawn = pixel_gaussian(train, 4000, seed=1).float()
    inner = train.images.float()[:, :, 2:6, 2:6]  # where clamping at 0 and 255 matters least
    assert torch.allclose(drawn[:, :, 2:6, 2:6].mean(0), inner.mean(0), atol=15)
    assert not torch.equal(pixel_gaussian(train, 5, seed=1), pixel_gaussian(train, 5, seed=2))
