"""Training on a store of latents: refused before the first step where anything is wrong, exact where nothing is."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from latent_stores import write_store
from small_runs import assert_same_bits, run, stopped

from dispersive_kit.cli import main
from dispersive_kit.data.autoencoders import load_autoencoder, register_autoencoder
from dispersive_kit.data.latents import LatentStore, Selection
from dispersive_kit.diffusion.objectives import FlowMatching
from dispersive_kit.errors import CheckpointError, ConfigError, DataError
from dispersive_kit.evaluation import decoder_of, generate, load_reference
from dispersive_kit.models.dit import build_dit
from dispersive_kit.training import TRAIN_PRESETS, load_run, train_preset
from dispersive_kit.training.batches import LatentSet


@register_autoencoder("four channels")
class FourChannels:
    scale, shift = 0.5, 0.25
    gain = 1.0

    def encode(self, x):
        raise AssertionError("the store of these tests is made without images")

    def decode(self, z):
        return (self.gain * z[:, :3]).repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(-1, 1)

    def state_dict(self):
        return {"gain": torch.tensor(self.gain)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "store"
    card = load_autoencoder("four channels").card
    return write_store(folder, rows=300, shape=(4, 8, 8), card=card)


def config(store, **changes):
    small = {"steps": 6, "checkpoint_every": 2, "eval_every": 3, "batch_size": 8, "flip": True, "preview_images": 0}
    return train_preset("smoke", data=str(store), **{"model": "DiT-T/4"} | small | changes)


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    return run(config(store), tmp_path_factory.mktemp("trained") / "run")


def batch(store, *, step=0, seed=0, flip=True, size=64):
    given = LatentSet(Selection(LatentStore(store)), "cpu")
    return given.batch(FlowMatching(), seed=seed, step=step, size=size, null_label=None, drop_prob=0.0, flip=flip)


def test_x0_is_a_scaled_draw_from_the_posterior_of_the_image_or_its_mirror_image(store):
    opened, drawn = LatentStore(store), batch(store)
    rows = Selection(opened).draw(0, 0, 64)
    raw = drawn.x0 / 0.5 + 0.25
    distance = [
        (raw - opened.read(rows, np.full(64, flipped))[:, 0].float()).flatten(1).square().mean(1).sqrt()
        for flipped in (False, True)
    ]
    nearest = torch.stack(distance).min(0)
    assert ((nearest.values - 0.1).abs() < 0.03).all()  # the std stored is 0.1
    assert 16 < int(nearest.indices.sum()) < 48  # both, about equally often
    assert torch.equal(drawn.y, torch.from_numpy(opened.labels(rows)))


def test_the_next_epoch_draws_anew_and_the_same_step_does_not(store):
    first, again = batch(store), batch(store)
    assert torch.equal(first.x0, again.x0) and torch.equal(first.draws.t, again.draws.t)
    opened = Selection(LatentStore(store))
    n = len(opened)  # 270 rows: with batches of 270 a step is an epoch
    one, two = (batch(store, step=step, size=n, flip=False) for step in (0, 1))
    order = [opened.draw(0, step, n).argsort() for step in (0, 1)]
    change = one.x0[order[0]] - two.x0[order[1]]
    assert change.std() == pytest.approx(0.5 * 0.1 * 2**0.5, rel=0.05)  # two draws of std 0.1, scaled


def test_a_run_stopped_on_latents_resumes_to_the_same_bits(store, trained, tmp_path):
    folder = stopped(config(store), tmp_path / "run", after=3)
    assert_same_bits(run(config(store), folder, resume=True), trained)


def test_samples_are_decoded_by_the_stores_autoencoder_and_measured_against_its_decodings(
    trained, tmp_path, monkeypatch
):
    main(["sample", str(trained), "--out", str(tmp_path / "s"), "--num", "5", "--num-steps", "2"])
    images = np.load(tmp_path / "s" / "samples.npz")["arr_0"]
    assert images.shape == (5, 64, 64, 3)
    assert np.array_equal(images, images[:, ::8, ::8].repeat(8, 1).repeat(8, 2))  # as that decoder, and no other, does
    main(["evaluate", str(trained), "--num", "40", "--num-steps", "1", "--extractor", "pixels-pca32"])
    (file,) = trained.glob("evaluation-*.json")
    record = json.loads(file.read_text())
    assert record["protocol"]["reference"]["data"] == "store-decoded"
    assert record["protocol"]["autoencoder"]["scale"] == 0.5
    monkeypatch.setitem(load_reference.__globals__, "DECODED", 20)
    real, held_out = load_reference(load_run(trained)[1]["config"], decoder_of(load_run(trained)[1]))
    assert (len(real), len(held_out)) == (20, 20) and real.images.shape[1:] == (3, 64, 64)


def test_another_autoencoder_is_refused_before_training_and_before_sampling(store, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(FourChannels, "gain", 1.001)
    with pytest.raises(DataError, match="weights_sha256"):
        run(config(store), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="weights_sha256"):
        decoder_of(load_run(trained)[1])


def test_a_store_of_another_autoencoder_is_no_reference(trained, tmp_path):
    card = replace(load_autoencoder("four channels").card, weights_sha256="0" * 64)
    other = config(write_store(tmp_path / "other", rows=100, shape=(4, 8, 8), card=card))
    with pytest.raises(DataError, match="weights_sha256"):
        load_reference(other, decoder_of(load_run(trained)[1]))


def test_a_run_does_not_go_on_with_another_store_at_the_same_place(store, tmp_path):
    card = load_autoencoder("four channels").card
    copied = shutil.copytree(store, tmp_path / "store")
    run(config(copied, steps=2), tmp_path / "run")
    run(config(copied, steps=2), tmp_path / "run", resume=True)
    shutil.rmtree(copied)
    write_store(copied, rows=300, shape=(4, 8, 8), card=card, seed=1)
    with pytest.raises(CheckpointError, match="was trained on other data"):
        run(config(copied, steps=2), tmp_path / "run", resume=True)


def test_previews_of_latents_are_kept_as_numbers_however_many_channels_they_have(tmp_path):
    of_three = write_store(tmp_path / "store", rows=300, shape=(3, 8, 8), card=load_autoencoder("four channels").card)
    run(config(of_three, steps=1, preview_images=2), tmp_path / "run")
    assert [file.name for file in (tmp_path / "run" / "previews").iterdir()] == ["step-00000001.safetensors"]


@pytest.mark.parametrize("fault", ["flipped bit", "missing", "spec", "scale"])
def test_a_damaged_store_is_refused_by_name_before_training(store, tmp_path, fault):
    copied = shutil.copytree(store, tmp_path / "store")
    file = copied / ("spec.json" if fault in ("spec", "scale") else "shard-00001.safetensors")
    content = file.read_bytes()
    if fault == "missing":
        file.unlink()
    else:
        flipped = content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:]
        scaled = content.replace(b'"scale": 0.5', b'"scale": 0.18125')
        file.write_bytes({"flipped bit": flipped, "spec": content[:-40], "scale": scaled}[fault])
    with pytest.raises(DataError, match=file.name):
        run(config(copied), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_that_is_not_here_is_said_and_does_not_stop_training(tmp_path):
    folder = write_store(tmp_path / "store", rows=100, shape=(4, 8, 8))
    with pytest.warns(UserWarning, match="cannot be decoded here"):
        run(config(folder, steps=1), tmp_path / "run")


def test_mirror_images_that_are_not_stored_are_refused(tmp_path):
    folder = write_store(tmp_path / "store", rows=100, shape=(4, 8, 8), flip=False)
    with pytest.raises(ConfigError, match="no mirror images"):
        run(config(folder), tmp_path / "run")


@pytest.mark.parametrize("size", ["cifar10-s2", "imagenet-s2", "imagenet-b2", "imagenet-l2", "imagenet-xl2"])
def test_the_presets_for_gpus_have_four_arms_of_one_recipe(size):
    base, *arms = (TRAIN_PRESETS[f"{size}-{arm}"] for arm in ("base", "paper", "disp", "placebo"))
    assert not base.regularizer.added and all(arm.changed(regularizer=base.regularizer) == base for arm in arms)
    kinds = [(a.preset, a.group_size, bool(a.norm_matched)) for a in (arm.regularizer for arm in arms)]
    assert kinds == [("paper", 16, False), ("official-pytorch", 32, False), ("paper", 16, True)]
    assert (base.batch_size, base.class_dropout_prob, base.flip, base.betas) == (256, 0.1, True, (0.9, 0.999))
    if size.startswith("imagenet"):  # the official recipe
        assert (base.learning_rate, base.schedule, base.warmup_steps, base.weight_decay) == (1e-4, "constant", 0, 0)
        assert base.ema_decay == 0.9999 and base.steps * 256 == pytest.approx(80 * 1_281_167, rel=1e-5)
        with torch.device("meta"):
            model = build_dit(base.model, input_size=32, in_channels=4, num_classes=1000)
        assert model.pos_embed.shape[1] == 256


def test_a_decoder_is_what_generate_uses(trained):
    model = load_run(trained)[0]
    plain = generate(model, torch.tensor([0]), num_steps=1, decode=lambda x: x[:, :3])
    assert plain.shape == (1, 3, 8, 8)
