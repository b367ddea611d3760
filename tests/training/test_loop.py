import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from dispersive_kit.data import load_images
from dispersive_kit.errors import CheckpointError, ConfigError, KitError
from dispersive_kit.regularizers import dispersive_loss
from dispersive_kit.training import RegularizerConfig, TrainConfig, load_run, train, train_preset, with_settings
from dispersive_kit.training.batches import DeviceSet, sample_index, split_share, stream
from dispersive_kit.training.train import EMA, Session, _gradient_ratio

SMOKE = train_preset("smoke", steps=6)
PAPER_SET = {"regularizer.preset": "paper"}
POINTS = {"data": "two-moons", "model": "MLP"}
PART = PAPER_SET | {"regularizer.at": "blocks.1.adaLN_modulation.1"}  # no whole block, and it ends with a number
PAPER = SMOKE.changed(regularizer=RegularizerConfig(preset="paper"))


def run(config, folder):
    return list(train(config, folder))


def test_both_arms_start_from_the_same_bits(tmp_path):
    base, paper = (Session(c, tmp_path / c.regularizer.preset, resume=False) for c in (SMOKE, PAPER))
    a, b = base.model.state_dict(), paper.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_both_arms_are_fed_the_same_numbers_at_every_step(tmp_path, monkeypatch):
    fed = {}
    real = Session.batch

    def noted(self, step):
        batch = real(self, step)
        fed.setdefault(self.config.regularizer.preset, []).append(batch)
        return batch

    monkeypatch.setattr(Session, "batch", noted)
    for config in (SMOKE, PAPER):
        run(config, tmp_path / config.regularizer.preset)
    assert len(fed["none"]) == len(fed["paper"]) == SMOKE.steps
    for a, b in zip(fed["none"], fed["paper"], strict=True):
        assert torch.equal(a.x0, b.x0) and torch.equal(a.y, b.y)
        assert torch.equal(a.draws.t, b.draws.t) and torch.equal(a.draws.eps, b.draws.eps)


def test_a_share_of_the_data_is_that_share_of_every_class_and_lies_within_a_larger_one(tmp_path):
    images = load_images("digits")
    parts = [split_share(images, share)[0] for share in (0.1, 0.3, 1.0)]
    rows = [{row.tobytes() for row in part.images.numpy()} for part in parts]
    assert rows[0] < rows[1] < rows[2]
    for part, share in zip(parts, (0.1, 0.3, 1.0), strict=True):
        assert part.labels.bincount().tolist() == [round(share * n) for n in images.labels.bincount().tolist()]
    session = Session(SMOKE.changed(data_share=0.1), tmp_path / "run", resume=False)
    assert session.source.card["samples"] == len(session.source.train) == len(parts[0])
    assert session.source.card["sha256"] == parts[0].sha256 != images.sha256


def test_the_placebo_brings_the_features_to_its_size_and_spreads_them_no_more_than_the_base_arm(tmp_path):
    arms = {
        "base": RegularizerConfig(),
        "placebo": RegularizerConfig(preset="paper", norm_matched=3.0),
        "paper": RegularizerConfig(preset="paper"),
    }
    last = {}
    for name, regularizer in arms.items():
        config = SMOKE.changed(steps=30, eval_every=30, checkpoint_every=30, preview_images=0)
        last[name] = run(config.changed(regularizer=regularizer), tmp_path / name)[-1].values
    assert last["base"]["feature_rms"] < 1.5 and abs(last["placebo"]["feature_rms"] - 3.0) < 0.3
    relative = {name: values["dispersive"] for name, values in last.items()}
    assert relative["paper"] < -3.4 < relative["placebo"]  # -log 32 = -3.47: only the paper arm is at its floor
    assert last["placebo"]["gradient_ratio"] > 0


@pytest.mark.parametrize("added", [True, False])
def test_the_gradient_ratio_is_that_of_two_separate_backward_passes(added):
    torch.manual_seed(0)
    x, w = torch.randn(8, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    z = x @ w
    loss, dispersive = z.sin().square().mean(), 0.3 * dispersive_loss(z)
    pull, push = (torch.autograd.grad(value, z, retain_graph=True)[0].norm() for value in (dispersive, loss))
    ratio = _gradient_ratio(dispersive, [z], added=added)
    ((loss + dispersive if added else loss) / 3).backward()
    torch.testing.assert_close(ratio(1 / 3), pull / push)


def test_training_leaves_the_global_generators_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(PAPER, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_measuring_dispersion_does_not_change_the_base_arm(tmp_path):
    often = SMOKE.changed(log_every=1)
    seldom = SMOKE.changed(log_every=1000)
    run(often, tmp_path / "often")
    run(seldom, tmp_path / "seldom")
    a, b = (load_run(tmp_path / name, weights="model")[0].state_dict() for name in ("often", "seldom"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_record_comes_for_each_step_and_values_at_logged_ones(tmp_path):
    records = run(PAPER.changed(log_every=3, eval_every=4), tmp_path / "run")
    assert [r.step for r in records] == [1, 2, 3, 4, 5, 6]
    assert [bool(r.values) for r in records] == [False, False, True, True, False, True]
    assert {"loss", "gap", "feature_rms", "gradient_ratio", "grad_norm"} <= records[2].values.keys()
    assert {"held_out", "held_out_t0", "held_out_t3"} <= records[3].values.keys()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 6] and lines[0]["gap"] >= -1e-5


def test_no_hook_is_left_on_the_model_when_the_loop_is_left(tmp_path, monkeypatch):
    seen = []
    real = Session.batch
    monkeypatch.setattr(Session, "batch", lambda self, step: seen.append(self.model) or real(self, step))
    for _ in train(PAPER, tmp_path / "run"):
        break
    assert not any(module._forward_hooks for module in seen[0].modules())


def test_accumulation_gives_the_same_denoising_gradient(tmp_path):
    whole = SMOKE.changed(steps=1, batch_size=32)
    parts = whole.changed(accumulation=4)
    grads = {}
    for name, config in (("whole", whole), ("parts", parts)):
        [record] = run(config, tmp_path / name)
        card = json.loads((tmp_path / name / "run.json").read_text())
        grads[name] = record.values["grad_norm"], card["dispersion_batch"], record.values["loss"]
    assert grads["whole"][0] == pytest.approx(grads["parts"][0], rel=1e-5)
    assert (grads["whole"][1], grads["parts"][1]) == (32, 8)
    assert grads["whole"][2] == pytest.approx(grads["parts"][2], rel=1e-5)  # logged of all parts, not of the last


@pytest.mark.parametrize("config", [SMOKE, PAPER], ids=["base", "paper"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint_before(tmp_path, monkeypatch, config):
    real = Session.batch

    def poisoned(self, step):
        batch = real(self, step)
        return dataclasses.replace(batch, x0=batch.x0 * float("nan")) if step == 7 else batch

    monkeypatch.setattr(Session, "batch", poisoned)
    with pytest.raises(KitError, match=r"step 8.*newest checkpoint in .* is from before"):
        run(config.changed(steps=20, log_every=5, checkpoint_every=5), tmp_path / "run")
    model, card = load_run(tmp_path / "run", weights="model")
    assert card["step"] == 5 and all(v.isfinite().all() for v in model.state_dict().values())


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"data": "digit"}, KitError, "digits, photos, mnist, cifar10"),
        ({"model": "DiT-Q/2"}, ConfigError, "DiT-XL"),
        ({"model": "DiT-T/16"}, ConfigError, "patch"),
        ({"regularizer.preset": "papers"}, ConfigError, "official-pytorch"),
        (PAPER_SET | {"regularizer.at": "blocks.7"}, ConfigError, "blocks.7"),
        (PAPER_SET | {"regularizer.kind": "infonce"}, ConfigError, "infonce_l2"),
        (PAPER_SET | {"batch_size": 1}, ConfigError, "one image has no pairs"),
        (PAPER_SET | {"accumulation": 32}, ConfigError, "less accumulation"),
        (PAPER_SET | {"regularizer.group_size": 1}, ConfigError, "group_size is 1"),
        (
            PAPER_SET | {"regularizer.group_size": 12},
            ConfigError,
            "local batch of 32 .* groups of 12",
        ),
        ({"regularizer.group_size": 12}, ConfigError, "cannot be split into groups of 12"),
        (
            PAPER_SET | {"regularizer.group_size": 8, "regularizer.gather": True},
            ConfigError,
            "group_size parts",
        ),
        ({"regularizer.weight": 0.5}, ConfigError, "preset is none"),
        (PART | {"objective": "meanflow"}, ConfigError, "whole blocks"),
        ({"objective": "meanflow", "checkpointing": True}, ConfigError, "checkpointing cannot go with meanflow"),
        ({"data": "two-moons"}, ConfigError, "MLP"),
        ({"model": "MLP"}, ConfigError, "DiT-T/2"),
        (POINTS | {"data_share": 0.5}, ConfigError, "is for sets of images"),
        (POINTS | {"flip": True}, ConfigError, "flip is for images"),
        ({"image_size": 64}, ConfigError, "a size of its own"),
        ({"regularizer.gather": True}, ConfigError, "regularizer.gather needs several processes"),
        (PAPER_SET | {"regularizer.gather": True}, ConfigError, "regularizer.gather needs several processes"),
    ],
)
def test_what_cannot_work_is_refused_with_the_cure_before_there_is_a_run(tmp_path, config, error, words):
    with pytest.raises(error, match=words):
        run(with_settings(SMOKE, config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_image_at_a_time_trains_without_the_loss(tmp_path):
    *_, last = run(SMOKE.changed(batch_size=1, steps=2), tmp_path / "run")
    assert math.isfinite(last.values["loss"]) and "gap" not in last.values


def test_another_precision_in_the_same_process_is_refused_with_the_cure(tmp_path):
    run(SMOKE.changed(steps=1), tmp_path / "run")
    with pytest.raises(ConfigError, match="restart the kernel"):
        run(SMOKE.changed(steps=1, precision="bf16"), tmp_path / "other")


def test_a_configuration_survives_json():
    config = train_preset("digits", seed=4, regularizer=RegularizerConfig(preset="paper", tau=0.25))
    assert TrainConfig.from_json(config.to_json()) == config


def test_a_run_that_is_not_there_or_has_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no run"):
        load_run(tmp_path)
    for _ in train(SMOKE, tmp_path / "run"):
        break
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load_run(tmp_path / "run")


def test_each_epoch_is_one_permutation_across_uneven_batches():
    drawn = torch.cat([sample_index(seed=1, step=s, batch_size=7, n=20) for s in range(20)])
    for epoch in drawn.split(20):
        assert sorted(epoch.tolist()) == list(range(20))
    assert not torch.equal(drawn[:20], drawn[20:40])


def test_a_slice_of_the_global_batch_is_the_same_whoever_draws_it():
    from dispersive_kit.diffusion.objectives import FlowMatching

    data = DeviceSet.of(load_images("digits"), "cpu")
    draw = {"seed": 0, "step": 3, "size": 24, "null_label": 10, "drop_prob": 0.5, "flip": True}
    one, two = (data.batch(FlowMatching(), **draw) for _ in range(2))
    parts = [two.rows(i, 3) for i in range(3)]
    assert torch.equal(one.x0, torch.cat([p.x0 for p in parts]))
    assert torch.equal(one.y, torch.cat([p.y for p in parts])) and (one.y == 10).any() and (one.y != 10).any()
    assert torch.equal(one.draws.eps, torch.cat([p.draws.eps for p in parts]))


def test_streams_of_different_name_or_step_differ():
    drawn = {
        tuple(torch.randn(3, generator=stream(*key)).tolist())
        for key in [(0, "batch", 0), (0, "batch", 1), (1, "batch", 0), (0, "order", 0)]
    }
    assert len(drawn) == 4


def test_the_learning_rate_warms_up_and_decays_to_nothing():
    config = train_preset("digits", steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [config.learning_rate_at(s) for s in range(100)]
    assert rates[0] < 0.11 and max(rates) <= 1 and rates[-1] < 0.001 and rates.index(max(rates)) in range(8, 12)


def test_the_average_is_the_recursion_written_out():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    ema = EMA(model, decay=0.9)
    expected = model.weight.detach().clone()
    for n in range(30):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, dtype=torch.float64))
        ema.update(model)
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * model.weight.detach()
    assert torch.allclose(ema.model.weight, expected, atol=1e-12)
    assert not ema.model.weight.requires_grad and not ema.model.training


def test_buffers_are_copied_not_averaged():
    model = nn.BatchNorm1d(2)
    ema = EMA(model)
    model.train()(torch.randn(8, 2) + 5)
    ema.update(model)
    assert torch.equal(ema.model.running_mean, model.running_mean)
