"""What a run leaves beside its checkpoints, its other objectives and data, and any setting by name."""

import json
import re
import sys
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from small_runs import assert_same_bits, run, stopped

from dispersive_kit.diffusion.guidance import ClassifierFree
from dispersive_kit.errors import ConfigError
from dispersive_kit.training import RegularizerConfig, StepRecord, TrainConfig, load_run, train, train_preset
from dispersive_kit.training.config import RETIRED, with_settings
from dispersive_kit.training.runs import read_metrics, sample_batch
from dispersive_kit.training.train import Session, progress

SMOKE = train_preset("smoke", steps=4, checkpoint_every=2, model="DiT-T/4")
PAPER = RegularizerConfig(preset="paper")


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """Folder and records of a run with the loss that logs each step."""
    folder = tmp_path_factory.mktemp("paper") / "run"
    return folder, list(train(SMOKE.changed(regularizer=PAPER, log_every=1), folder))


def test_a_preview_is_drawn_at_each_checkpoint_and_only_then(paper):
    found = sorted(paper[0].glob("previews/*"))
    assert [file.name for file in found] == ["step-00000002.png", "step-00000004.png"]
    with Image.open(found[0]) as image:
        assert image.size == (8 * 9 + 1, 2 * 9 + 1)  # 16 digits of 8 x 8 in rows of eight


@pytest.mark.parametrize("objective", ["ddpm", "meanflow"])
def test_other_objectives_train_with_the_loss_resume_and_sample(tmp_path, objective):
    config = SMOKE.changed(objective=objective, regularizer=PAPER, log_every=1)
    records = list(train(config, tmp_path / "whole"))
    assert all(record.values["gradient_ratio"] > 0 for record in records)
    assert_same_bits(run(config, stopped(config, tmp_path / "run", after=3), resume=True), tmp_path / "whole")
    model, _ = load_run(tmp_path / "run")
    x = sample_batch(model, torch.arange(3), [0, 1, 2], objective=objective, num_steps=2)
    assert x.shape == (3, 1, 8, 8) and x.isfinite().all()


def test_points_train_and_their_samples_come_near_the_data(tmp_path):
    config = train_preset("toy", steps=150, log_every=50, eval_every=50, checkpoint_every=150, regularizer=PAPER)
    records = [r for r in train(config, tmp_path / "run") if r.values]
    assert records[-1].values["held_out"] < 0.8 * records[0].values["held_out"] or records[-1].values["held_out"] < 1.0
    model, card = load_run(tmp_path / "run")
    assert card["data"]["shape"] == [2]
    x = sample_batch(model, torch.arange(200) % 2, range(200), num_steps=10)
    assert x.shape == (200, 2) and float(x.abs().max()) < 6


@pytest.mark.parametrize("dropped", [0.0, 0.1])
def test_points_are_guided_only_if_labels_were_dropped(tmp_path, dropped):
    run(train_preset("toy", steps=2, batch_size=8, class_dropout_prob=dropped), tmp_path / "run")
    model, _ = load_run(tmp_path / "run")
    guidance = ClassifierFree(torch.tensor([0, 1]), model.null_label, 2.0)
    with nullcontext() if dropped else pytest.raises(ConfigError, match="train with class dropout"):
        sample_batch(model, torch.tensor([0, 1]), range(2), num_steps=1, guidance=guidance)


def test_a_weight_of_zero_and_one_scheduled_to_zero_train_on(tmp_path):
    for name, more in (("zero", {"weight": 0.0}), ("stopped", {"schedule": "stop-at", "schedule_steps": 2})):
        config = SMOKE.changed(regularizer=PAPER.changed(**more), log_every=1)
        records = list(train(config, tmp_path / name))
        assert records[-1].values["gradient_ratio"] == 0


def test_recomputed_blocks_train_the_same_model(tmp_path, paper):
    config = SMOKE.changed(regularizer=PAPER, checkpointing=True, preview_images=0)
    again = list(train(config, tmp_path / "again"))
    assert not (tmp_path / "again" / "previews").exists()
    assert again[-1].values["loss"] == pytest.approx(paper[1][-1].values["loss"], rel=1e-5)


def test_settings_are_taken_by_name_and_checked():
    config = with_settings(TrainConfig(), {"accumulation": 2, "regularizer.gather": True, "learning_rate": 1})
    assert (config.accumulation, config.regularizer.gather) == (2, True)
    for settings, words in [
        ({"acumulation": 2}, "no setting"),
        ({"regularizer.gathers": True}, "regularizer: gathers.*did you mean gather"),
        ({"model.depth": 3}, "no setting"),
        ({"accumulation": 2.5}, "int"),
        ({"accumulation": True}, "int"),
        ({"objective": "flows"}, "ddpm"),
        ({"batch_size": 7, "accumulation": 2}, "equal parts"),
        ({"preview_images": -1}, "preview_images = -1"),
        ({"data_share": 0.0}, "data_share = 0"),
        *(({name: 0}, name) for name in ("steps", "batch_size", "learning_rate", "keep_last")),
        ({"regularizer.preset": "paper", "regularizer.memory": 64}, "set accumulation above 1|accumulation 1 there"),
        ({"regularizer.preset": "paper", "regularizer.schedule_steps": 5}, "no schedule"),
    ]:
        with pytest.raises(ConfigError, match=words):
            with_settings(TrainConfig(), settings)
    with pytest.raises(ConfigError, match=r"unknown preset 'digit'.* digits,"):
        train_preset("digit")


def test_every_line_of_the_log_is_json(paper):
    """At the first step the output is zero, so the denoising gradient at the tap is too, and their ratio infinite."""
    folder, records = paper
    assert records[0].values["gradient_ratio"] == float("inf")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [line["step"] for line in logged] == [1, 2, 3, 4] and "gradient_ratio" in logged[1]


def test_adamw_is_told_its_betas_and_decay(tmp_path):
    config = with_settings(SMOKE, {"betas": [0.8, 0.95], "weight_decay": 0.1})
    session = Session(config, tmp_path / "run", resume=False)
    [group] = session.optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.95), 0.1)
    assert TrainConfig.from_json((tmp_path / "run" / "config.json").read_text()) == config
    with session.held:
        pass


def test_bf16_is_taken_where_it_is_asked_for(tmp_path, run_command, paper):
    settings = {"steps": 4, "model": "DiT-T/4", "precision": "bf16", "checkpoint_every": 2, "accumulation": 2}
    settings["regularizer.memory"] = 8
    arguments = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    run_command(["train", "--preset", "smoke", "--regularizer", "paper", *arguments, "--out", tmp_path / "run"])
    card = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (card["precision"], card["dispersion_batch"], card["dispersion_memory"]) == ("bf16", 16, 8)
    held_out, exact = read_metrics(tmp_path / "run")[-1]["held_out"], paper[1][-1].values["held_out"]
    assert exact != held_out == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_on_a_terminal_and_a_line_a_tenth_elsewhere(capsys, monkeypatch, terminal):
    """With rate and time left; of a run that is gone on with after two steps."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    records = [StepRecord(step, 20, {"loss": 1.25, "held_out": 0.5}) for step in range(3, 21)]
    assert list(progress(records, "paper")) == records
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    if terminal:
        assert re.search(r"paper: 100%.*20/20 \[\d\d:\d\d<00:00, .*step/s, loss 1.250  held_out 0.500\]", printed.err)
    else:
        assert re.fullmatch(r"paper: step 20/20, loss 1.250  held_out 0.500  [\d.]+ step/s  00:00 left", lines[-1])
    assert len(lines) == 0 if terminal else 10  # of the first step, then of each tenth
    assert terminal or not printed.err


def test_the_kept_settings_of_an_old_run_are_read_and_those_that_are_no_more_refused_by_name():
    own = {name: value for name, value in RETIRED.items() if "." not in name}
    old = json.loads(TrainConfig().model_dump_json()) | own | {"tensorboard": True}
    assert TrainConfig.from_json(json.dumps(old)) == TrainConfig()
    used = {"ema_widths": [0.05, 0.1], "classes": ["n01"], "balanced": True, "fsdp": True}
    assert used.keys() == own.keys()
    for name, value in used.items():
        with pytest.raises(ConfigError, match=name):
            TrainConfig.from_json(json.dumps(old | {name: value}))
    ablation = json.loads(PAPER.model_dump_json()) | {"ignore_same_class": True}
    with pytest.raises(ConfigError, match=r"regularizer\.ignore_same_class is True"):
        TrainConfig.from_json(json.dumps(old | {"regularizer": ablation}))
