"""kill -9 at random moments: after resume, the weights, the averages and the optimizer are the same bits.

Digits and CIFAR images; accumulation, the average and two tracked averages on; two processes in half of the runs.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import run_command, start

from dispersive_kit.training.checkpoint import load_latest

STEPS, EVERY = 18, 3
SETTINGS = [
    "--preset", "smoke", "--steps", STEPS, "--checkpoint-every", EVERY, "--regularizer", "paper",
    "--set", "accumulation=2", "--set", "ema_widths=[0.05,0.1]",
]  # fmt: skip
# kind of data, processes
KINDS = [("digits", 1), ("digits", 2), ("cifar10", 1), ("cifar10", 2)]


@pytest.fixture(scope="module")
def command(cifar_folder):
    extra = {"digits": [], "cifar10": ["--data", "cifar10", "--model", "DiT-T/4", "--data-dir", cifar_folder]}
    return lambda data, out: ["train", *SETTINGS, *extra[data], "--resume", "--out", out]


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    """The final tensors of each kind of run that nobody killed, trained when first asked for."""
    known = {}

    def get(data, processes):
        if (data, processes) not in known:
            out = tmp_path_factory.mktemp("whole") / "run"
            run_command(command(data, out), processes)
            known[data, processes] = load_latest(out / "checkpoints")
        return known[data, processes]

    return get


def kill_at_random(arguments: list[object], processes: int, out: Path, rng: random.Random) -> None:
    """Kill the whole process group, some time after the first sign of a checkpoint being written."""
    process = start(arguments, processes)
    deadline = time.monotonic() + 200
    wanted = rng.randrange(STEPS // EVERY)
    while process.poll() is None and time.monotonic() < deadline:
        if len(list(out.glob("checkpoints/*"))) and newest(out) >= wanted * EVERY:
            break
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.3))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def newest(out: Path) -> int:
    return max((int(p.name[5:]) for p in out.glob("checkpoints/step-*")), default=0)


def check_one(command, uninterrupted, tmp_path, data, processes, seed):
    rng, out = random.Random(seed), tmp_path / "run"
    kill_at_random(command(data, out), processes, out, rng)
    run_command(command(data, out), processes)
    got, expected = load_latest(out / "checkpoints"), uninterrupted(data, processes)
    assert got.step == expected.step == STEPS
    assert set(got.groups) == {"model", "ema", "0.05", "0.1", "optimizer"}
    for group, tensors in expected.groups.items():
        assert got.groups[group].keys() == tensors.keys()
        assert all(torch.equal(got.groups[group][name], tensor) for name, tensor in tensors.items()), group


@pytest.mark.parametrize(("data", "processes"), [("digits", 1), ("cifar10", 2)])
def test_a_killed_training_resumes_to_the_same_bits(command, uninterrupted, tmp_path, data, processes):
    check_one(command, uninterrupted, tmp_path, data, processes, seed=100 + processes)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_twenty_kills_lose_nothing(command, uninterrupted, tmp_path, seed):
    check_one(command, uninterrupted, tmp_path, *KINDS[seed % 4], seed)
