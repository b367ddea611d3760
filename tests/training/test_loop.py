import json
import math

import pytest
import torch
from small_runs import assert_same_bits, stopped
from torch import nn

from dispersive_kit.data import ImageSet, load_images
from dispersive_kit.diffusion.objectives import FlowMatching
from dispersive_kit.errors import CheckpointError, ConfigError, KitError
from dispersive_kit.regularizers import dispersive_loss
from dispersive_kit.training import RegularizerConfig, load_run, train, train_preset, with_settings
from dispersive_kit.training.batches import DeviceSet, sample_index, split_share, stream
from dispersive_kit.training.train import EMA, Session, _gradient_ratio

SMOKE = train_preset("smoke", steps=6, model="DiT-T/4")
PAPER_SET = {"regularizer.preset": "paper"}
POINTS = {"data": "two-moons", "model": "MLP"}
PART = PAPER_SET | {"regularizer.at": "blocks.1.adaLN_modulation.1"}  # no whole block, and it ends with a number
PAPER = SMOKE.changed(regularizer=RegularizerConfig(preset="paper"))


def run(config, folder):
    return list(train(config, folder))


def test_both_arms_start_from_the_same_bits_and_are_fed_the_same_numbers(tmp_path):
    base, paper = (Session(c, tmp_path / c.regularizer.preset, resume=False) for c in (SMOKE, PAPER))
    a, b = base.model.state_dict(), paper.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for step in range(3):
        a, b = base.batch(step), paper.batch(step)
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


@pytest.mark.parametrize(("classes", "each", "left"), [(10, 100, 510), (10, 30, 270), (600, 3, 600)])
def test_validation_images_are_of_every_class_few_and_none_that_is_trained_on(classes, each, left):
    pixels = torch.arange(classes * each).reshape(-1, 1, 1, 1)
    images = torch.cat([pixels % 256, pixels // 256], dim=-1).to(torch.uint8).expand(-1, 1, 2, 2)
    labels = torch.arange(classes).repeat(each)
    data = ImageSet("made", "train", images, labels, tuple(map(str, range(classes))), "here", "none")
    kept, others = split_share(data, 0.1)
    rows = [{row.tobytes() for row in part.images.contiguous().numpy()} for part in (kept, others)]
    assert len(rows[1]) == len(others) == left and not rows[0] & rows[1]
    assert set(others.labels.tolist()) == set(range(classes)) and split_share(data, 1.0)[1] is None


def test_the_placebo_brings_the_features_to_its_size_and_spreads_them_no_more_than_the_base_arm(tmp_path):
    arms = {"base": SMOKE, "placebo": with_settings(PAPER, {"regularizer.norm_matched": 3.0}), "paper": PAPER}
    longer = {"steps": 30, "eval_every": 30, "checkpoint_every": 30, "preview_images": 0}
    last = {name: run(config.changed(**longer), tmp_path / name)[-1].values for name, config in arms.items()}
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
    for every in (1, 1000):
        run(SMOKE.changed(log_every=every), tmp_path / str(every))
    assert_same_bits(tmp_path / "1", tmp_path / "1000")


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
    values = []
    for parts, seen in ((1, 32), (4, 8)):
        [record] = run(SMOKE.changed(steps=1, batch_size=32, accumulation=parts), tmp_path / str(parts))
        values.append([record.values[name] for name in ("grad_norm", "loss")])  # of all parts, not of the last
        assert json.loads((tmp_path / str(parts) / "run.json").read_text())["dispersion_batch"] == seen
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("config", [SMOKE, PAPER], ids=["base", "paper"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint_before(tmp_path, monkeypatch, config):
    real = Session.batch

    def poisoned(self, step):
        batch = real(self, step)
        return batch._replace(x0=batch.x0 * float("nan")) if step == 7 else batch

    monkeypatch.setattr(Session, "batch", poisoned)
    with pytest.raises(KitError, match=r"step 8.*newest checkpoint in .*, if any, is from an earlier step"):
        run(config.changed(steps=20, log_every=5, checkpoint_every=5), tmp_path / "run")
    model, card = load_run(tmp_path / "run", weights="model")
    assert card["step"] == 5 and all(v.isfinite().all() for v in model.state_dict().values())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"data": "digit"}, "digits, photos, mnist, cifar10"),
        ({"model": "DiT-Q/2"}, "DiT-XL"),
        ({"model": "DiT-T/16"}, "patch"),
        ({"regularizer.preset": "papers"}, "official-pytorch"),
        (PAPER_SET | {"regularizer.at": "blocks.7"}, "blocks.7"),
        (PAPER_SET | {"regularizer.kind": "infonce"}, "infonce_l2"),
        (PAPER_SET | {"batch_size": 1}, "one image has no pairs"),
        (PAPER_SET | {"accumulation": 32}, "less accumulation"),
        (PAPER_SET | {"regularizer.group_size": 1}, "group_size is 1"),
        (PAPER_SET | {"regularizer.group_size": 12}, "local batch of 32 .* groups of 12"),
        (PAPER_SET | {"regularizer.group_size": 8, "regularizer.gather": True}, "group_size splits"),
        ({"regularizer.weight": 0.5}, "preset none takes only at, depth"),
        (PART | {"objective": "meanflow"}, "whole blocks"),
        ({"objective": "meanflow", "checkpointing": True}, "checkpointing frees activations"),
        ({"data": "two-moons"}, "MLP"),
        ({"model": "MLP"}, "DiT-T/2"),
        (POINTS | {"data_share": 0.5}, "is for sets of images"),
        (POINTS | {"flip": True}, "flip is for images"),
        ({"image_size": 64}, "has a fixed size"),
        (PAPER_SET | {"regularizer.gather": True}, "regularizer.gather needs several processes"),
    ],
)
def test_what_cannot_work_is_refused_with_the_cure_before_there_is_a_run(tmp_path, config, words):
    with pytest.raises(KitError, match=words):
        run(with_settings(SMOKE, config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_image_at_a_time_trains_without_the_loss(tmp_path):
    *_, last = run(SMOKE.changed(batch_size=1, steps=2), tmp_path / "run")
    assert math.isfinite(last.values["loss"]) and "gap" not in last.values


def test_another_precision_in_the_same_process_is_refused_with_the_cure(tmp_path):
    run(SMOKE.changed(steps=1), tmp_path / "run")
    with pytest.raises(ConfigError, match="restart the kernel"):
        run(SMOKE.changed(steps=1, precision="bf16"), tmp_path / "other")


def test_a_run_that_is_not_there_or_has_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no run"):
        load_run(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load_run(stopped(SMOKE, tmp_path / "run", after=1))


def test_each_epoch_is_one_permutation_across_uneven_batches():
    drawn = torch.cat([sample_index(seed=1, step=s, batch_size=7, n=20) for s in range(20)])
    for epoch in drawn.split(20):
        assert sorted(epoch.tolist()) == list(range(20))
    assert not torch.equal(drawn[:20], drawn[20:40])


def test_a_slice_of_the_global_batch_is_the_same_whoever_draws_it():
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
