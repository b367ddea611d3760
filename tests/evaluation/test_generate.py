"""Images drawn from runs and from sets: by their own seeds, in random order, whatever the number of processes."""

import re
import sys
import weakref

import numpy as np
import pytest
import torch
import warm

from dispersive_kit.errors import ConfigError, KitError
from dispersive_kit.evaluation import draw_images, generate, make_extractor, pixel_gaussian
from dispersive_kit.evaluation.generate import Samples, shared_out
from dispersive_kit.evaluation.panel import describe_set
from dispersive_kit.training import load_run

OPTIONS = {"--num": 300, "--num-steps": 2, "--extractor": "pixels-pca32", "--metrics": "FD"}
EVALUATE = ["evaluate", "digits-base", *(word for pair in OPTIONS.items() for word in pair)]
module = sys.modules["dispersive_kit.evaluation.generate"]


def test_two_processes_write_the_file_of_one_and_print_it_once(tmp_path):
    printed = warm.run("dispersive-kit", *EVALUATE, "--out", tmp_path / "two.json", processes=2)
    warm.run("dispersive-kit", *EVALUATE, "--out", tmp_path / "one.json")
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert printed.count("FD[pixels/pca32, N=300]") == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_batches_are_dealt_out_once_each_whatever_the_count(monkeypatch, count):
    dealt = []
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "gathered", lambda own: own)
    for rank in range(count):
        state = type("State", (), {"process_index": rank, "num_processes": count, "is_local_main_process": True})()
        monkeypatch.setattr(module, "this_process", lambda state=state: state)
        dealt += shared_out(lambda rows: (rows.start, rows.stop), 10, "")
    assert sorted(dealt) == [(0, 4), (4, 8), (8, 10)]


def test_what_takes_more_than_some_seconds_says_what_is_done_and_how_long_it_will_take(
    digits, space, monkeypatch, capsys
):
    space(digits[1].images)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "PATIENCE", {"delay": 0, "mininterval": 0})
    space(digits[1].images)
    generate(load_run("digits-base")[0], torch.arange(2), num_steps=1)
    make_extractor("classifier", *digits)
    said = capsys.readouterr().err
    for words in ("features by pixels/pca32", "drawing samples", "training digits-classifier48"):
        assert re.search(rf"{words}:.*/.*<", said), words


def test_features_are_those_of_images_drawn_at_once_and_a_batch_is_forgotten_before_the_next(space, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 16)
    model, labels, seen = load_run("digits-base")[0], torch.arange(40) % 10, []

    class Watched(Samples):
        def __getitem__(self, rows):
            assert not any(batch() is not None for batch in seen)
            images = super().__getitem__(rows)
            seen.append(weakref.ref(images))
            return images

    options = {"num_steps": 2, "first_seed": 7, "cfg_scale": 1.5}
    streamed = space(Watched(model, labels, **options))
    assert np.array_equal(streamed, space(generate(model, labels, **options))) and len(seen) == 3


def test_guidance_in_no_interval_is_no_guidance_and_labels_are_classes():
    model, _ = load_run("digits-base")
    labels = torch.arange(6)
    plain, nowhere, guided, part = (
        generate(model, labels, num_steps=3, **options)
        for options in (
            {},
            {"cfg_scale": 3.0, "guidance_low": 0.4, "guidance_high": 0.6},
            {"cfg_scale": 3.0},
            {"cfg_scale": 3.0, "guidance_low": 0.5},
        )
    )
    assert torch.equal(plain, nowhere)  # none of the times 1, 2/3, 1/3 and 0 lies in there
    assert not torch.equal(plain, guided) and not torch.equal(part, guided)
    with pytest.raises(ConfigError, match=r"0\.\.9, got 10"):
        generate(model, torch.tensor([10]))


def test_a_model_that_draws_nan_is_an_error_and_not_a_black_image():
    model, _ = load_run("digits-base")
    next(model.parameters()).data[0, 0] = float("nan")
    with pytest.raises(KitError, match="NaN or infinity among the samples with seeds 4 to 5"):
        generate(model, torch.arange(2), num_steps=2, first_seed=4)


def test_a_part_is_drawn_from_all_classes_of_a_sorted_set_and_the_same_each_time(digits):
    ordered = digits[1].subset(digits[1].labels.argsort())
    drawn, again = (draw_images(ordered, 100) for _ in range(2))
    assert torch.equal(drawn.images, again.images) and len(drawn.labels.unique()) == 10
    assert len(drawn.images.flatten(1).unique(dim=0)) == 100
    part, whole = draw_images(digits[1], 100), draw_images(digits[1], 10**6)
    assert describe_set(part)["drawn_from"] == 500 and describe_set(draw_images(part, 200))["drawn_from"] == 500
    assert len(whole) == 500 and "drawn_from" not in describe_set(whole)
    assert torch.equal(whole.labels.sort().values, digits[1].labels.sort().values)


def test_the_gaussian_has_the_moments_of_the_pixels(digits):
    train, _ = digits
    drawn = pixel_gaussian(train, 4000, seed=1).float()
    inner = train.images.float()[:, :, 2:6, 2:6]  # where clamping at 0 and 255 matters least
    assert torch.allclose(drawn[:, :, 2:6, 2:6].mean(0), inner.mean(0), atol=15)
    assert not torch.equal(pixel_gaussian(train, 5, seed=1), pixel_gaussian(train, 5, seed=2))
