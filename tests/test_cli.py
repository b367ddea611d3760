import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from PIL import Image

from dispersive_kit.cli import COMMANDS, main
from dispersive_kit.errors import CheckpointError
from dispersive_kit.models.dit import build_dit
from dispersive_kit.training import load_run

TRAIN = ["train", "--preset", "smoke", "--steps", "4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    main([*TRAIN, "--out", str(folder)])
    return folder


def refused(capsys, *args):
    """Run a command that must end with status 2; returns what it said."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, args)))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_train_sample_evaluate_go_together(trained, tmp_path, capsys):
    main(["sample", str(trained), "--out", str(tmp_path / "s"), "--num", "12", "--num-steps", "2", "--cfg-scale", "2"])
    images = np.load(tmp_path / "s" / "samples.npz")["arr_0"]
    assert images.shape == (12, 8, 8, 1) and images.dtype == np.uint8
    assert Image.open(tmp_path / "s" / "grid.png").size == (91, 19)
    main(["evaluate", str(trained), "--num", "40", "--num-steps", "2", "--extractor", "pixels-pca32"])
    (file,) = trained.glob("evaluation-*.json")
    read = json.loads(file.read_text())
    assert read["numbers"][0]["name"] == "FD[pixels/pca32, N=40]" and read["protocol"]["step"] == 4
    printed = capsys.readouterr().out
    assert all(number["name"] in printed for number in read["numbers"]) and str(file) in printed


def test_points_are_neither_drawn_as_images_nor_measured_as_images(tmp_path, capsys):
    main(["train", "--preset", "toy", "--steps", "1", "--out", str(tmp_path / "run")])
    for command in (["sample", tmp_path / "run", "--out", tmp_path / "s"], ["evaluate", tmp_path / "run"]):
        assert "run was trained on points, and they are no images: for points, see" in refused(capsys, *command)
    assert not (tmp_path / "s").exists()


def test_samples_from_elsewhere_are_measured_like_ones_of_a_run(trained, tmp_path):
    options = ["--num", "30", "--num-steps", "2"]
    main(["sample", str(trained), "--out", str(tmp_path / "s"), *options])
    evaluate = ["--num", "30", "--extractor", "pixels-pca32", "--memorisation"]
    main(["evaluate", str(tmp_path / "s" / "samples.npz"), "--data", "digits", *evaluate])
    main(["evaluate", str(trained), "--out", str(tmp_path / "run.json"), *evaluate, "--num-steps", "2"])
    (file,) = (tmp_path / "s").glob("evaluation-samples-*.json")
    ours, theirs = (json.loads(f.read_text())["numbers"] for f in (tmp_path / "run.json", file))
    assert [number["name"].partition("[")[0] for number in ours][-2:] == ["nearest-train", "copies"]
    for a, b in zip(ours, theirs, strict=True):
        assert a["name"] == b["name"] and a["value"] == pytest.approx(b["value"], rel=1e-4, abs=1e-6)


def test_a_sample_depends_on_its_own_seed_only(trained, tmp_path):
    for name, options in {"a": ["--num", "5"], "b": ["--num", "3", "--seed", "2"]}.items():
        command = ["sample", str(trained), "--out", str(tmp_path / name), "--num-steps", "3", "--label", "1"]
        main([*command, *options])
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in "ab")
    assert np.abs(a[2:5] - b).max() <= 1  # one grey level: other batch shapes round differently


@pytest.mark.parametrize("options", [["--sampler", "sde"], ["--sampler", "euler"], ["--guidance", "0.2", "0.6"]])
def test_sampler_and_interval_of_guidance_change_the_samples(trained, tmp_path, options):
    found = []
    for name, given in {"a": [], "b": options, "c": options}.items():
        command = ["sample", str(trained), "--out", str(tmp_path / name), "--num", "3", "--num-steps", "5"]
        main([*command, "--cfg-scale", "3", *given])
        found.append(np.load(tmp_path / name / "samples.npz")["arr_0"])
    assert not np.array_equal(found[0], found[1]) and np.array_equal(found[1], found[2])


def test_faults_are_one_clear_line(trained, tmp_path, capsys):
    new = tmp_path / "new"
    assert "--resume" in refused(capsys, *TRAIN, "--out", trained)
    assert "mnist, cifar10" in refused(capsys, *TRAIN, "--data", "digitz", "--out", new)
    assert "smoke, toy" in refused(capsys, "train", "--preset", "tiny", "--out", new)
    assert "official-pytorch" in refused(capsys, *TRAIN, "--regularizer", "ours", "--out", new)
    assert "blocks.9" in refused(
        capsys, *TRAIN, "--regularizer", "paper", "--set", "regularizer.at=blocks.9", "--out", new
    )
    assert "0..9" in refused(capsys, "sample", trained, "--label", "10", "--out", new)
    assert "there are: heun, euler" in refused(capsys, "sample", trained, "--sampler", "ddim", "--out", new)
    assert "no run" in refused(capsys, "evaluate", tmp_path)
    assert "this is not FID" in refused(capsys, "evaluate", trained, "--metrics", "FID", "--extractor", "pixels-pca32")
    assert "no Inception weights" in refused(capsys, "evaluate", trained, "--extractor", "inception")
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((20, 9, 9, 1), np.uint8))
    assert "--data" in refused(capsys, "evaluate", tmp_path / "samples.npz")
    samples = ["evaluate", tmp_path / "samples.npz", "--data", "digits", "--extractor", "pixels-pca32"]
    assert "--num 20" in refused(capsys, *samples)
    assert "(1, 8, 8)" in refused(capsys, *samples, "--num", "20")
    for weights in ("optimizer", "model:0.08"):
        assert "weights" in refused(capsys, "sample", trained, "--weights", weights, "--out", new)
    assert "has no parameter" in refused(capsys, "run", "06", "-p", "sed=3", "--out", new)
    assert "is int" in refused(capsys, "run", "06", "-p", "seed=three", "--out", new)
    assert "NAME=VALUE" in refused(capsys, "run", "06", "-p", "seed", "--out", new)
    assert "00_start_here" in refused(capsys, "run", "42", "--out", new)
    assert not new.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert COMMANDS[command].__doc__.splitlines()[0].split(":")[0][:30] in " ".join(text.split())


def test_a_progress_line_comes_every_tenth_without_a_terminal(tmp_path):
    command = [sys.executable, "-m", "dispersive_kit.cli", "train", "--preset", "smoke", "--out", str(tmp_path / "r")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-1].startswith("done") and sum(line.startswith("step") for line in lines) == 11


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num", "0"], "--num must be at least 4, got 0"),
        (["--num", "-5"], "--num must be at least 4, got -5"),
        (["--num-steps", "0"], "num_steps 0 must be at least 1"),
        (["--cfg-scale", "nan"], "cfg_scale must be a number, got nan"),
    ],
)
def test_numbers_that_measure_nothing_are_refused(capsys, options, words):
    given = ["--num", "20"] if "--num" not in options else []
    assert words in refused(capsys, "evaluate", "digits-base", "--extractor", "pixels-pca32", *given, *options)


def test_a_result_that_cannot_be_written_is_refused_before_the_work(trained, tmp_path, capsys, monkeypatch):
    said = refused(capsys, "evaluate", trained, "--num", "40", "--out", tmp_path)
    assert "is a folder: name a file" in said
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, "evaluate", trained, "--num", "40", "--out", tmp_path / "file" / "x")
    assert "file" in refused(capsys, *TRAIN, "--out", tmp_path / "file")
    assert "file" in refused(capsys, "export", trained, "--out", tmp_path / "file")
    assert "--num must be at least 1" in refused(capsys, "sample", trained, "--out", tmp_path / "s", "--num", "0")
    monkeypatch.setattr("dispersive_kit.evaluation.generate", lambda *_, **__: pytest.fail("drawn first"))
    assert "cannot be written" in refused(capsys, "sample", trained, "--out", tmp_path / "file" / "x", "--num", "2")


def test_options_that_would_change_nothing_are_refused(trained, tmp_path, capsys):
    main(["sample", "digits-base", "--out", str(tmp_path / "s"), "--num", "20", "--num-steps", "1"])
    file = tmp_path / "s" / "samples.npz"
    evaluate = ["evaluate", file, "--data", "digits", "--num", "20"]
    assert "drawn already: --num-steps, --vae would" in refused(capsys, *evaluate, "--num-steps", "9", "--vae", "x")
    for command in (["sample", trained, "--out", tmp_path / "t", "--num", "2"], ["evaluate", trained, "--num", "20"]):
        assert "is for runs on latents" in refused(capsys, *command, "--vae", "/no/such")
    assert "image_size is for folders" in refused(capsys, *TRAIN, "--out", tmp_path / "u", "--set", "image_size=16")
    missing = [*TRAIN, "--out", tmp_path / "u", "--data", "/no/such", "--set", "image_size=16"]
    assert "unknown data set '/no/such'" in refused(capsys, *missing)
    assert "a notebook runs alone" in refused(capsys, "run", "01", "--out", tmp_path / "v", "--workers", "2")


def test_what_is_out_of_reach_is_named(trained, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; kept are: 4"):
        load_run(trained, step=3)
    beyond = ["--seed", "99999999999999999999"]
    assert f"seed = {beyond[1]}: Input should be less than {2**63}" in refused(
        capsys, *TRAIN, "--out", tmp_path / "t", *beyond
    )
    assert "64 bits" in refused(capsys, "sample", trained, "--out", tmp_path / "s", "--num", "2", *beyond)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where not even root may write")
def test_a_shipped_run_is_not_measured_where_its_record_cannot_be_kept(monkeypatch, capsys):
    monkeypatch.chdir("/proc")
    began = time.process_time()
    assert "cannot be written" in refused(capsys, "evaluate", "digits-base", "--num", "2000")
    assert time.process_time() - began < 10  # it takes a minute


def test_a_report_is_of_the_runs_that_were_named(tmp_path, capsys):
    said = refused(capsys, "study", "report", "1-noise-floor", "--out", tmp_path / "nothing")
    assert "no results yet" in said and str(tmp_path / "nothing") in said
    (tmp_path / "results.json").write_text("{}")
    assert "Field required" in refused(capsys, "study", "report", "1-noise-floor", "--out", tmp_path)


def test_a_command_leaves_the_group_of_its_processes_as_it_ends():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    main(["study", "table"])
    assert not dist.is_initialized()


@pytest.mark.parametrize("words", ["study table", "doctor", "--help", "--version", "sample --help"])
def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word(monkeypatch, capfd, words):
    """Such as `| head`; mutations: what is left is flushed as Python ends; a long output is only flushed once more"""
    with open(open_pipe_without_reader(), "w") as pipe:  # noqa: PTH123 (of a descriptor)
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            main(words.split())
    assert ended.value.code == 141 and "Broken pipe" not in capfd.readouterr().err


def test_a_broken_pipe_to_another_process_is_a_fault(monkeypatch, capsys):
    monkeypatch.setattr("dispersive_kit.study.machine.examine", lambda: os.write(open_pipe_without_reader(), b"x"))
    assert "Broken pipe" in refused(capsys, "doctor")


def open_pipe_without_reader():
    read, write = os.pipe()
    os.close(read)
    return write


def test_published_checkpoints_are_sampled(tmp_path, capsys):
    state = build_dit("DiT-T/2", input_size=8, in_channels=4, num_classes=10, learn_sigma=True).state_dict()
    torch.save({"ema": state}, file := tmp_path / "DiT-T-2.pt")
    sizes = {"block_out_channels": (8, 8), "down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 4}
    vae = AutoencoderKL(**sizes, up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4)
    vae.save_pretrained(tmp_path / "vae")
    command = ["sample", "--published", str(file), "--num", "3", "--num-steps", "2", "--cfg-scale", "2"]
    assert "--vae" in refused(capsys, *command, "--out", tmp_path / "s")
    three = build_dit("DiT-T/2", input_size=8, in_channels=3, num_classes=10, learn_sigma=True).state_dict()
    torch.save({"ema": three}, tmp_path / "DiT-three.pt")
    other = ["sample", "--published", tmp_path / "DiT-three.pt", "--vae", tmp_path / "vae", "--out", tmp_path / "t"]
    assert "draws latents of 3 channels" in refused(capsys, *other)
    assert "either a run or" in refused(capsys, "sample", "digits-base", *command[1:], "--out", tmp_path / "s")
    main([*command, "--vae", str(tmp_path / "vae"), "--out", str(tmp_path / "s")])
    assert np.load(tmp_path / "s" / "samples.npz")["arr_0"].shape == (3, 16, 16, 3)
