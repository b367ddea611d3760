"""A whole evaluation: what moves the number stands in its record, and a file sorted by class is drawn from."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dispersive_kit.data import load_images
from dispersive_kit.errors import KitError
from dispersive_kit.evaluation import generate
from dispersive_kit.evaluation.evaluate import evaluate, record_file
from dispersive_kit.evaluation.export import save_npz
from dispersive_kit.evaluation.options import Evaluation
from dispersive_kit.training import load_run, shipped

HOW = Evaluation(extractor="pixels-pca32", metrics="FD", num=60, num_steps=2, cfg_scale=2.0, resamples=5)
CHANGES = {
    "seed": 60,
    "num_steps": 3,
    "cfg_scale": 3.0,
    "guidance_low": 0.5,
    "guidance_high": 0.5,
    "num": 50,
    "num_reference": 200,
    "reference": "train",
    "extractor": "random-conv",
}


def measured(**changes):
    (record,) = evaluate(Path("digits-base"), dataclasses.replace(HOW, **changes))
    return record


@pytest.fixture(scope="module")
def plain():
    return measured()


@pytest.mark.parametrize("option", CHANGES)
def test_whatever_moves_the_number_stands_in_its_record(plain, option):
    changed = measured(**{option: CHANGES[option]})
    assert changed.value != plain.value
    assert (changed.name, changed.protocol) != (plain.name, plain.protocol)


def test_the_arm_stands_in_the_record_by_the_hash_of_its_weights(plain):
    (other,) = evaluate(Path("digits-paper"), HOW)
    assert other.protocol["checkpoint_sha256"] != plain.protocol["checkpoint_sha256"]
    assert other.protocol["run"] == "digits-paper" and other.protocol["device"] == "cpu"


def test_every_setting_has_a_file_of_its_own(plain):
    files = {record_file(Path("digits-base"), dataclasses.replace(HOW, **{k: v}), plain) for k, v in CHANGES.items()}
    files.add(record_file(Path("digits-base"), HOW, plain))
    assert len(files) == len(CHANGES) + 1
    elsewhere = dataclasses.replace(HOW, data_dir="/another/place")
    assert record_file(Path("digits-base"), elsewhere, plain) in files


def test_the_number_is_the_same_when_it_is_measured_again(plain):
    assert measured() == plain


def test_of_a_file_sorted_by_class_all_classes_are_measured(tmp_path):
    train = load_images("digits")
    file = tmp_path / "sorted.npz"
    save_npz(train.images[train.labels.argsort(stable=True)], file)
    how = Evaluation(extractor=HOW.extractor, metrics=HOW.metrics, data="digits", num=100)
    (record,) = evaluate(file, how)
    assert record.value == pytest.approx(record.floor, rel=0.4)  # real images, as far as the floor's
    assert len(np.load(file)["arr_0"]) == 1297 and record.n == 100


def test_a_model_that_draws_nan_is_an_error_and_not_a_black_image():
    model, _ = load_run(shipped("digits-base"))
    next(model.parameters()).data[0, 0] = float("nan")
    with pytest.raises(KitError, match="drew NaN or infinity, among the images with seeds 4 to 5"):
        generate(model, torch.arange(2), num_steps=2, first_seed=4)
