"""What may change when a run goes on: where its data lie, and, at a constant rate, how far it goes."""

import json
import shutil

import numpy as np
import pytest
from small_runs import assert_same_bits, run
from torchvision.utils import save_image

from dispersive_kit.data import load_images
from dispersive_kit.errors import CheckpointError
from dispersive_kit.training import train_preset

SMOKE = train_preset("smoke", steps=2, batch_size=8, preview_images=0, model="DiT-T/4")
FOLDER = SMOKE.changed(image_size=16)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "photos"
    for i, image in enumerate(load_images("photos").images[:20]):
        (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        save_image(image.float() / 255, folder / f"class{i % 2}" / f"{i:02}.png")
    return folder


def test_a_folder_of_data_that_was_moved_or_is_spelt_otherwise_is_the_same_data(photos, tmp_path, monkeypatch):
    run(FOLDER.changed(data=str(photos)), tmp_path / "run")
    moved = shutil.copytree(photos, tmp_path / "other disk" / "pictures")
    monkeypatch.chdir(tmp_path)
    for place in (str(moved), "other disk/pictures", "./other disk/../other disk/pictures/"):
        run(FOLDER.changed(data=place), tmp_path / "run", resume=True)


@pytest.fixture(scope="module")
def cifar_run(cifar_folder, tmp_path_factory):
    config = SMOKE.changed(data="cifar10", data_dir=str(cifar_folder))
    return run(config, tmp_path_factory.mktemp("cifar") / "run"), config


@pytest.mark.parametrize("change", ["training image", "held-out image", "class name", "class order"])
def test_other_images_or_names_in_the_same_place_are_other_data(cifar_folder, cifar_run, tmp_path, change):
    data, (folder, config) = shutil.copytree(cifar_folder, tmp_path / "data"), cifar_run
    with np.load(data / "cifar10.npz") as file:
        arrays = dict(file)
    if change.endswith("image"):
        arrays["images"][{"training image": 0, "held-out image": -1}[change]] ^= 1
    else:
        arrays["classes"] = np.array(["cat", *arrays["classes"][1:]]) if "name" in change else arrays["classes"][::-1]
    np.savez(data / "cifar10.npz", **arrays)
    with pytest.raises(CheckpointError, match="was trained on other data"):
        run(config.changed(data_dir=str(data)), folder, resume=True)


def test_a_run_of_0_1_whose_card_has_the_hash_of_the_training_images_alone_goes_on(tmp_path):
    file = run(SMOKE, tmp_path / "run") / "run.json"
    card = json.loads(file.read_text())
    del card["data"]["all_sha256"]
    file.write_text(json.dumps(card))
    run(SMOKE, tmp_path / "run", resume=True)
    assert "all_sha256" in json.loads(file.read_text())["data"]
    card["data"]["sha256"] = "0" * 64
    file.write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"other data: digits from .* Name the old data \(--data\)"):
        run(SMOKE, tmp_path / "run", resume=True)


def test_more_steps_at_a_constant_rate_give_the_bits_of_the_longer_run(tmp_path):
    longer = SMOKE.changed(steps=5, schedule="constant")
    run(longer.changed(steps=3), tmp_path / "run")
    assert_same_bits(run(longer, tmp_path / "run", resume=True), run(longer, tmp_path / "whole"))


@pytest.mark.parametrize(("schedule", "steps"), [("constant", 2), ("cosine", 5), ("cosine", 2)])
def test_fewer_steps_and_another_length_of_a_cosine_are_another_configuration(tmp_path, schedule, steps):
    config = SMOKE.changed(steps=3, schedule=schedule)
    run(config, tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"steps: 3 -> {steps}"):
        run(config.changed(steps=steps), tmp_path / "run", resume=True)
