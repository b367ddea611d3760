"""A run that was stopped, however rudely, goes on to the same bits."""

import json
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from dispersive_kit.errors import CheckpointError
from dispersive_kit.training import RegularizerConfig, load_run, train, train_preset
from dispersive_kit.training.checkpoint import checkpoints, load_checkpoint, load_latest

CONFIG = train_preset("smoke", steps=14, checkpoint_every=3, regularizer=RegularizerConfig(preset="paper"))
COMMAND = [
    sys.executable, "-m", "dispersive_kit.cli", "train", "--preset", "smoke", "--steps", "60",
    "--checkpoint-every", "7", "--regularizer", "paper", "--resume", "--out",
]  # fmt: skip


def run(folder, config=CONFIG, **options):
    for _ in train(config, folder, **options):
        pass
    return folder


def final_tensors(folder):
    return load_latest(folder / "checkpoints").groups


def assert_same_bits(a, b):
    assert a.keys() == b.keys() and set(a) == {"model", "ema", "optimizer"}
    for group in a:
        assert a[group].keys() == b[group].keys()
        assert all(torch.equal(a[group][k], b[group][k]) for k in a[group]), group


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "run")


def test_a_run_stopped_between_checkpoints_resumes_to_the_same_bits(tmp_path, whole):
    for record in train(CONFIG, tmp_path / "run"):
        if record.step == 8:
            break  # the newest checkpoint is of step 6
    run(tmp_path / "run", resume=True)
    assert_same_bits(final_tensors(tmp_path / "run"), final_tensors(whole))


def test_the_log_of_a_resumed_run_is_that_of_a_whole_one(tmp_path, whole):
    for record in train(CONFIG, tmp_path / "run"):
        if record.step == 11:
            break
    (tmp_path / "run" / "metrics.jsonl").open("a").write('{"step": 12, "lo')  # a kill in the middle of a line
    run(tmp_path / "run", resume=True)
    first, second = ((f / "metrics.jsonl").read_text() for f in (whole, tmp_path / "run"))
    assert first == second


@pytest.fixture(scope="module")
def whole_command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole_command") / "run"
    subprocess.run([*COMMAND, str(folder)], check=True, capture_output=True)
    return folder


def stop_at_random(folder, number, rng):
    """Start the command, send it a signal at a random moment after its first checkpoint, return its exit status."""
    process = subprocess.Popen([*COMMAND, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not checkpoints(folder / "checkpoints"):
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.0))
    process.send_signal(number)
    return process.wait(60)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143), (signal.SIGINT, 130)],
    ids=["kill -9", "SIGTERM", "Ctrl-C"],
)
def test_a_killed_command_resumes_to_the_same_bits(tmp_path, whole_command, number, status):
    ended = stop_at_random(tmp_path / "run", number, random.Random(int(number)))
    assert ended in (status, 0)
    if number != signal.SIGKILL and ended:  # the step in hand was finished and saved
        log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert load_latest(tmp_path / "run" / "checkpoints").step >= json.loads(log[-1])["step"]
    subprocess.run([*COMMAND, str(tmp_path / "run")], check=True, capture_output=True)
    assert_same_bits(final_tensors(tmp_path / "run"), final_tensors(whole_command))


def test_an_existing_run_is_refused_without_resume_and_left_as_it_was(whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    with pytest.raises(CheckpointError, match="--resume"):
        run(whole)
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("three years of work")
    with pytest.raises(CheckpointError, match="holds no run"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_changed_configuration_is_refused_with_the_difference(whole):
    other = train_preset("smoke", steps=14, checkpoint_every=5, learning_rate=0.5)
    with pytest.raises(CheckpointError, match=r"learning_rate: 0\.004 -> 0\.5") as caught:
        run(whole, other, resume=True)
    assert "checkpoint_every" not in str(caught.value)  # cadence may change


def interrupted(folder):
    for record in train(CONFIG, folder):
        if record.step == 10:
            return folder  # checkpoints of steps 6 and 9
    return None


@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "manifest"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, whole, damage):
    folder = interrupted(tmp_path / "run")
    newest = checkpoints(folder / "checkpoints")[-1]
    file = newest / ("manifest.json" if damage == "manifest" else "model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "one bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="going back to step-00000006"):
        run(folder, resume=True)
    assert_same_bits(final_tensors(folder), final_tensors(whole))


def test_when_every_checkpoint_is_damaged_the_run_is_refused_by_name(tmp_path):
    folder = interrupted(tmp_path / "run")
    for path in checkpoints(folder / "checkpoints"):
        (path / "ema.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors"):
        run(folder, resume=True)
    with pytest.raises(CheckpointError, match="damaged"):
        load_run(folder)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, whole):
    folder = interrupted(tmp_path / "run")
    before = load_checkpoint(checkpoints(folder / "checkpoints")[-1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # what a write to a full disk looks like: it fails
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            run(folder, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = load_latest(folder / "checkpoints")
    assert after.step == before.step == 9 and not list((folder / "checkpoints").glob(".partial*"))
    run(folder, resume=True)
    assert_same_bits(final_tensors(folder), final_tensors(whole))
