"""Several processes: one objective, however the batch is split, and a dispersion batch that says how it was."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dispersive_kit.training import RegularizerConfig, load_run, train_preset
from dispersive_kit.training.checkpoint import checkpoints, load_latest

CLI = ["-m", "dispersive_kit.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
WORKER = str(Path(__file__).with_name("gradient_worker.py"))
# A gradient that is not clipped, of 64 images, with and without the loss.
PLAIN = train_preset("smoke", steps=1, batch_size=64, grad_clip=1e9)
GATHERED = RegularizerConfig(preset="paper", gather=True)


def gradient(tmp_path: Path, name: str, config, processes: int) -> tuple[dict[str, torch.Tensor], dict]:
    launcher = [sys.executable] if processes == 1 else [*TORCHRUN, str(processes)]
    out = tmp_path / name
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, WORKER, config.to_json(), str(out)], check=True, capture_output=True, env=environment)
    return load_file(f"{out}.safetensors"), json.loads((out / "run.json").read_text())


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two gradients over the norm of the first."""
    difference = torch.cat([(a[k] - b[k]).flatten() for k in a])
    return float(difference.norm() / torch.cat([v.flatten() for v in a.values()]).norm())


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Gradient and card of 64 images in one process, in 2 x 32, and in 2 x 16 with two micro-batches."""
    folder = tmp_path_factory.mktemp("splits")
    return {
        "64": gradient(folder, "64", PLAIN, 1),
        "2 x 32": gradient(folder, "2x32", PLAIN, 2),
        "2 x 16 x 2": gradient(folder, "2x16x2", dataclasses.replace(PLAIN, accumulation=2), 2),
    }


def test_the_denoising_gradient_does_not_depend_on_how_the_batch_is_split(splits):
    whole, _ = splits["64"]
    assert apart(whole, splits["2 x 32"][0]) < 1e-5
    assert apart(whole, splits["2 x 16 x 2"][0]) < 1e-5


def test_the_card_says_what_dispersive_loss_saw(splits):
    assert [card["dispersion_batch"] for _, card in splits.values()] == [64, 32, 16]
    assert [card["global_batch"] for _, card in splits.values()] == [64, 64, 64]
    assert [(card["processes"], card["accumulation"]) for _, card in splits.values()] == [(1, 1), (2, 1), (2, 2)]


def test_gathered_two_processes_equal_one_and_ungathered_they_do_not(tmp_path):
    config = dataclasses.replace(PLAIN, regularizer=GATHERED)
    local_config = dataclasses.replace(PLAIN, regularizer=RegularizerConfig(preset="paper"))
    one, _ = gradient(tmp_path, "one", local_config, 1)
    two, card = gradient(tmp_path, "two", config, 2)
    local, _ = gradient(tmp_path, "local", local_config, 2)
    assert apart(one, two) < 1e-5 and card["dispersion_batch"] == 64
    assert apart(one, local) > 1e-4  # the first gradient of a network whose gates are still shut


def finish_and_sample(run_command, out: Path, tmp_path: Path) -> None:
    model, card = load_run(out)
    assert card["step"] == 6 and all(v.isfinite().all() for v in model.state_dict().values())
    run_command(["sample", out, "--out", tmp_path / "samples", "--num", 10, "--num-steps", 2])
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (10, 8, 8, 1)


TRAIN = ["train", "--preset", "smoke", "--checkpoint-every", 3, "--regularizer", "paper"]


def test_accelerate_launch_trains_resumes_and_samples_on_two_processes(run_command, tmp_path):
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for steps in (3, 6):  # the second goes on from the first: a longer run of the same settings
        if steps == 6:
            config = json.loads((out / "config.json").read_text())
            (out / "config.json").write_text(json.dumps({**config, "steps": 6}))
        command = [*launch, *CLI, *map(str, TRAIN), "--steps", str(steps), "--resume", "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)
    assert json.loads((out / "run.json").read_text())["processes"] == 2
    finish_and_sample(run_command, out, tmp_path)


def test_fsdp_trains_resumes_to_the_same_bits_and_samples(run_command, tmp_path):
    arguments = [*TRAIN, "--steps", 6, "--fsdp", "--set", "ema_widths=[0.1]", "--resume", "--out"]
    run_command([*arguments, tmp_path / "whole"], processes=2)
    run_command([*arguments, tmp_path / "run"], processes=2)
    whole = load_latest(tmp_path / "whole" / "checkpoints").groups
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    for file in newest.iterdir():  # as if it had been killed after the checkpoint before
        file.unlink()
    newest.rmdir()
    run_command([*arguments, tmp_path / "run"], processes=2)
    again = load_latest(tmp_path / "run" / "checkpoints").groups
    for group, tensors in whole.items():
        assert all(torch.equal(again[group][k], v) for k, v in tensors.items()), group
    finish_and_sample(run_command, tmp_path / "run", tmp_path)


def test_fsdp_and_ddp_train_the_same_model(run_command, tmp_path):
    for name, extra in (("ddp", []), ("fsdp", ["--fsdp"])):
        run_command([*TRAIN, "--steps", 3, *extra, "--out", tmp_path / name], processes=2)
    a, b = (json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in ("ddp", "fsdp"))
    assert {k: a[k] for k in ("loss", "held_out")} == pytest.approx({k: b[k] for k in ("loss", "held_out")}, rel=1e-4)


def test_fsdp_in_one_process_is_refused_with_the_cure(tmp_path):
    process = subprocess.run(
        [sys.executable, *CLI, *map(str, TRAIN), "--fsdp", "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2 and "torchrun" in process.stderr
