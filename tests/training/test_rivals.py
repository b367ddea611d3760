"""The rivals as arms of one configuration: trained, resumed, on two processes, and gone from the model that samples."""

import json
import math
import shutil

import pytest
import torch
from small_runs import assert_same_bits, tensors

from dispersive_kit.errors import ConfigError
from dispersive_kit.training import (
    RegularizerConfig,
    export_run,
    load_run,
    read_metrics,
    regularizer,
    train,
    train_preset,
)
from dispersive_kit.training.checkpoint import checkpoints
from dispersive_kit.training.regularizer import HEAD
from dispersive_kit.training.train import Session

SMOKE = train_preset("smoke", batch_size=16, preview_images=2)
ARMS = {name: SMOKE.changed(regularizer=RegularizerConfig(preset=name)) for name in ("care", "layersync", "repa")}
ARMS["clean-patch"] = SMOKE.changed(regularizer=RegularizerConfig(preset="clean-patch", at="blocks.2", weight=0.2))
ARMS["meanflow"] = ARMS["repa"].changed(objective="meanflow")


@pytest.fixture(scope="module", params=ARMS)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    list(train(ARMS[request.param], folder))
    return folder


def test_an_arm_trains_and_resumes_to_the_same_bits(run, tmp_path, monkeypatch):
    """Mutations: an encoder with a gradient left over; one made anew on resume (its seed is another here)."""
    config, last = ARMS[run.parent.name[:-1]], read_metrics(run)[-1]
    assert math.isfinite(last["dispersive"]) and last["gradient_ratio"] > 0
    assert ("floor" in last) == (config.regularizer.preset == "care")
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    half = tensors(tmp_path / "run")["model"]
    monkeypatch.setitem(regularizer.ENCODER, "seed", 2)
    list(train(config, tmp_path / "run", resume=True))
    assert_same_bits(tmp_path / "run", run)
    projector = [key for key in half if key.startswith(f"{HEAD}.projector")]
    assert not [key for key in projector if torch.equal(half[key], tensors(run)["model"][key])]


def test_a_head_is_kept_for_training_and_is_no_part_of_the_model_that_samples(run, tmp_path):
    """Mutations: `load_run` takes all keys; the average holds a head."""
    preset = ARMS[run.parent.name[:-1]].regularizer.preset
    heads = {name for name, group in tensors(run).items() if any(key.startswith(HEAD) for key in group)}
    assert heads == ({"model"} if preset in ("repa", "clean-patch") else set())
    exported = export_run(run, tmp_path / "exported")
    for found in (load_run(run), load_run(run, weights="model"), load_run(exported)):
        assert not any(key.startswith(HEAD) for key in found[0].state_dict())
    card = json.loads((run / "run.json").read_text())
    assert card["parameters"] == sum(p.numel() for p in found[0].parameters()) - found[0].pos_embed.numel()
    assert ("encoder" in card) == (preset == "repa") and "judges no samples" in card.get("encoder", "judges no samples")


def test_a_head_moves_no_bit_of_the_model_it_is_added_to(tmp_path):
    """Mutation: the head drawn from the generator of the model, before it."""
    base, arm = (Session(one, tmp_path / str(i), resume=False) for i, one in enumerate((SMOKE, ARMS["clean-patch"])))
    for key, value in base.model.state_dict().items():
        assert torch.equal(value, arm.model.state_dict()[key]), key


def test_care_repels_no_pair_of_one_class_and_a_dropped_label_is_like_no_other(tmp_path):
    """Mutations: labels as the model sees them; no labels given to the loss."""
    session = Session(ARMS["care"].changed(class_dropout_prob=0.5), tmp_path / "run", resume=False)
    batch = session.batch(0)
    dropped = batch.y == session.model.null_label
    own = batch.condition[dropped]
    assert dropped.any() and (own < 0).all() and len(own.unique()) == len(own)
    assert torch.equal(batch.condition[~dropped], batch.y[~dropped])
    [record] = train(ARMS["care"].changed(steps=1), tmp_path / "trained")
    assert record.values["floor"] > -math.log(16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"regularizer": {"preset": "layersync", "tau": 0.5}}, "tau is set, and preset layersync takes only at,"),
        ({"regularizer": {"preset": "repa", "norm_matched": 2.0}}, "norm_matched is set"),
        ({"regularizer": {"preset": "clean-patch", "gather": False}}, "gather is set"),
        ({"regularizer": {"preset": "repa", "weight": -1.0}}, "weight is -1.0"),
        ({"regularizer": {"preset": "repa", "at": "blocks.1.attn.qkv"}}, "whole blocks"),
        ({"regularizer": {"preset": "layersync", "at": "blocks.3"}}, "a deeper one"),
        ({"regularizer": {"preset": "repa"}, "data": "two-moons", "model": "MLP"}, "DiT on images in pixels"),
        ({"regularizer": {"preset": "clean-patch"}, "data": "two-moons", "model": "MLP"}, "DiT on images or latents"),
    ],
)
def test_what_an_arm_cannot_do_is_refused_by_name(tmp_path, change, match):
    with pytest.raises(ConfigError, match=match):
        chosen = RegularizerConfig(**change["regularizer"])
        Session(SMOKE.changed(preview_images=0, **{**change, "regularizer": chosen}), tmp_path / "run", resume=False)
