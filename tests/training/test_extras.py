"""What a run leaves beside its checkpoints, its other objectives and data, and any setting by name."""

import contextlib
import dataclasses
import json
import os
import pty
import re
import subprocess
import sys
import termios
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dispersive_kit.data import load_images
from dispersive_kit.errors import ConfigError, KitError
from dispersive_kit.evaluation import Panel, balanced_labels, generate, make_extractor
from dispersive_kit.models import build_dit
from dispersive_kit.training import RegularizerConfig, TrainConfig, load_run, runs, train, train_preset, with_settings
from dispersive_kit.training.config import RETIRED
from dispersive_kit.training.runs import sample_batch
from dispersive_kit.training.train import Session

SMOKE = train_preset("smoke", steps=4, checkpoint_every=2)
PAPER = RegularizerConfig(preset="paper")


def test_a_preview_is_drawn_at_each_checkpoint_and_only_then(tmp_path):
    list(train(SMOKE, tmp_path / "run"))
    found = sorted(p.name for p in (tmp_path / "run" / "previews").iterdir())
    assert found == ["step-00000002.png", "step-00000004.png"]
    with Image.open(tmp_path / "run" / "previews" / found[0]) as image:
        assert image.size == (8 * 9 + 1, 2 * 9 + 1)  # 16 digits of 8 x 8 in rows of eight
    list(train(SMOKE.changed(preview_images=0), tmp_path / "none"))
    assert not (tmp_path / "none" / "previews").exists()


@pytest.mark.parametrize("objective", ["ddpm", "meanflow"])
def test_other_objectives_train_with_the_loss_resume_and_sample(tmp_path, objective):
    config = SMOKE.changed(objective=objective, regularizer=PAPER, log_every=1)
    records = list(train(config, tmp_path / "whole"))
    assert all(record.values["gradient_ratio"] > 0 for record in records)
    for record in train(config, tmp_path / "run"):
        if record.step == 3:
            break
    list(train(config, tmp_path / "run", resume=True))
    a, b = (load_run(tmp_path / name, weights="model")[0] for name in ("whole", "run"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    x = sample_batch(a, torch.arange(3), [0, 1, 2], objective=objective, num_steps=2)
    assert x.shape == (3, 1, 8, 8) and x.isfinite().all()


def test_points_train_and_their_samples_come_near_the_data(tmp_path):
    config = train_preset("toy", steps=150, log_every=50, eval_every=50, checkpoint_every=150, regularizer=PAPER)
    records = [r for r in train(config, tmp_path / "run") if r.values]
    assert records[-1].values["held_out"] < 0.8 * records[0].values["held_out"] or records[-1].values["held_out"] < 1.0
    model, card = load_run(tmp_path / "run")
    assert card["data"]["shape"] == [2]
    x = sample_batch(model, torch.arange(200) % 2, range(200), num_steps=10)
    assert x.shape == (200, 2) and float(x.abs().max()) < 6


@pytest.mark.parametrize("regularizer", [RegularizerConfig(), PAPER], ids=["base", "paper"])
def test_what_a_broken_step_was_fed_is_kept(tmp_path, monkeypatch, regularizer):
    real = Session.batch

    def poisoned(self, step):
        batch = real(self, step)
        return dataclasses.replace(batch, x0=batch.x0 / 0) if step == 2 else batch

    monkeypatch.setattr(Session, "batch", poisoned)
    with pytest.raises(KitError, match="What it was fed is in") as caught:
        list(train(SMOKE.changed(regularizer=regularizer), tmp_path / "run"))
    fed = load_file(tmp_path / "run" / "fed-at-step-00000003.safetensors")
    assert "fed-at-step-00000003" in str(caught.value)
    assert set(fed) == {"x0", "y", "t", "eps"} and len(fed["x0"]) == 32 and not fed["x0"].isfinite().all()
    assert load_run(tmp_path / "run")[1]["step"] == 2


def test_a_weight_of_zero_and_one_scheduled_to_zero_train_on(tmp_path):
    for name, more in (("zero", {"weight": 0.0}), ("stopped", {"schedule": "stop-at", "schedule_steps": 2})):
        regularizer = RegularizerConfig(preset="paper", **more)
        config = SMOKE.changed(regularizer=regularizer, log_every=1)
        records = list(train(config, tmp_path / name))
        assert records[-1].values["gradient_ratio"] == 0


def test_tensorboard_files_are_written_on_request(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    list(train(SMOKE.changed(tensorboard=True, log_every=1), tmp_path / "run"))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """Folder and records of a run with the loss that logs each step."""
    folder = tmp_path_factory.mktemp("paper") / "run"
    return folder, list(train(SMOKE.changed(regularizer=PAPER, log_every=1), folder))


def test_recomputed_blocks_train_the_same_model(tmp_path, paper):
    again = list(train(SMOKE.changed(regularizer=PAPER, checkpointing=True), tmp_path / "again"))
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
        ({"regularizer.preset": "paper", "regularizer.memory": 64}, "accumulation 1 has none|accumulation 1 there"),
        ({"regularizer.preset": "paper", "regularizer.schedule_steps": 5}, "no schedule"),
    ]:
        with pytest.raises(ConfigError, match=words):
            with_settings(TrainConfig(), settings)


def test_the_card_says_how_many_rows_the_memory_keeps(tmp_path):
    memory = PAPER.changed(memory=16)
    list(train(SMOKE.changed(accumulation=2, regularizer=memory), tmp_path / "run"))
    card = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (card["dispersion_batch"], card["dispersion_memory"]) == (SMOKE.batch_size // 2, 16)


def test_every_line_of_the_log_is_json(paper):
    """At the first step the output is zero, so the denoising gradient at the tap is too, and their ratio infinite."""
    folder, records = paper
    assert records[0].values["gradient_ratio"] == float("inf")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [line["step"] for line in logged] == [1, 2, 3, 4] and "gradient_ratio" in logged[1]


def test_bf16_is_taken_where_it_is_asked_for(tmp_path, run_command):
    for precision in ("fp32", "bf16"):
        arguments = ["--preset", "smoke", "--regularizer", "paper", "--set", f"precision={precision}"]
        run_command(["train", *arguments, "--out", tmp_path / precision])
    cards = [json.loads((tmp_path / p / "run.json").read_text())["precision"] for p in ("fp32", "bf16")]
    a, b = (json.loads((tmp_path / p / "metrics.jsonl").read_text().splitlines()[-1]) for p in ("fp32", "bf16"))
    assert cards == ["no", "bf16"]
    assert a["held_out"] != b["held_out"] == pytest.approx(a["held_out"], rel=0.02)


PROGRESS = ["train", "--preset", "smoke", "--out"]


def test_a_log_gets_a_line_a_tenth_with_rate_and_time_left(tmp_path, run_command):
    lines = [line for line in run_command([*PROGRESS, tmp_path / "run"]).splitlines() if line.startswith("step")]
    assert len(lines) == 11  # the first step, and ten tenths
    assert re.fullmatch(r"step 20/20  loss \d\.\d+  held_out \d\.\d+  [\d.]+ step/s  0:00:00 left", lines[-1])


def test_a_terminal_gets_a_bar_with_rate_and_time_left(tmp_path):
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    command = [sys.executable, "-m", "dispersive_kit.cli", *PROGRESS, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True)
    os.close(terminal)
    bar = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(reader, 4096):
            bar += chunk
    os.close(reader)
    assert process.wait(60) == 0 and "step 2/20" not in process.stdout.read()
    assert re.search(r"100%.*20/20 \[\d\d:\d\d<00:00, +[\d.]+step/s, loss [\d.]+  held_out", bar.decode())


def test_the_kept_settings_of_an_old_run_are_read_and_those_that_are_no_more_refused_by_name():
    old = json.loads(TrainConfig().to_json()) | RETIRED
    assert TrainConfig.from_json(json.dumps(old)) == TrainConfig()
    used = {"ema_widths": [0.05, 0.1], "weight_decay": 0.1, "classes": ["n01"], "balanced": True, "fsdp": True}
    assert used.keys() == RETIRED.keys()
    for name, value in used.items():
        with pytest.raises(ConfigError, match=name):
            TrainConfig.from_json(json.dumps(old | {name: value}))


@pytest.mark.long
def test_meanflow_learns_where_it_is_told_t_and_not_where_it_is_told_a_thousand_times_t(tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)
    config = train_preset("digits", steps=300, objective="meanflow", seed=90, eval_every=300, preview_images=0)
    real, held_out = load_images("digits", "train"), load_images("digits", "test")
    panel, distance = Panel(make_extractor("classifier", real, held_out), real, held_out, metrics=("FD",)), {}
    for scale in (1.0, 1000.0):
        monkeypatch.setattr(runs, "build_dit", partial(build_dit, time_scale=scale))
        for _ in train(config, tmp_path / str(scale)):
            pass
        images = generate(
            load_run(tmp_path / str(scale))[0], balanced_labels(2000, 10), objective="meanflow", num_steps=2
        )
        distance[scale] = panel.measure(images)[0].value
    with capsys.disabled():
        print(f"\n  FD[digits-classifier48, N=2000]: told t {distance[1.0]:.1f}, 1000 t {distance[1000.0]:.1f}")
    assert distance[1000.0] > 3 * distance[1.0]
