"""kill -9 at random moments: after resume, the weights, the averages and the optimizer are the same bits.

Digits and CIFAR images; accumulation on; two processes in half of the runs.
"""

import random
import time
from pathlib import Path

import pytest
import torch
import warm

from dispersive_kit.training.checkpoint import load_latest

STEPS, EVERY = 18, 3
SETTINGS = [
    "--preset", "smoke", "--steps", STEPS, "--set", f"checkpoint_every={EVERY}", "--regularizer", "paper",
    "--set", "accumulation=2",
]  # fmt: skip
# kind of data, processes
KINDS = [("digits", 1), ("digits", 2), ("cifar10", 1), ("cifar10", 2)]


@pytest.fixture(scope="module")
def command(cifar_folder):
    extra = {"digits": [], "cifar10": ["--data", "cifar10", "--model", "DiT-T/4", "--set", f"data_dir={cifar_folder}"]}
    return lambda data, out: ["train", *SETTINGS, *extra[data], "--resume", "--out", out]


@pytest.fixture(scope="module")
def uninterrupted(command, run_command, tmp_path_factory):
    """The final tensors of each kind of run that nobody killed, trained when first asked for."""
    known = {}

    def get(data, processes):
        if (data, processes) not in known:
            out = tmp_path_factory.mktemp("whole") / "run"
            run_command(command(data, out), processes)
            known[data, processes] = load_latest(out / "checkpoints")
        return known[data, processes]

    return get


def kill_at_random(process: warm.Started, out: Path, rng: random.Random) -> None:
    """Kill all of its processes, some time after a checkpoint that is drawn."""
    deadline = time.monotonic() + 600
    wanted = rng.randrange(STEPS // EVERY)
    while process.poll() is None and time.monotonic() < deadline:
        if len(list(out.glob("checkpoints/*"))) and newest(out) >= wanted * EVERY:
            break
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.3))
    process.kill()


def newest(out: Path) -> int:
    return max((int(p.name[5:]) for p in out.glob("checkpoints/step-*")), default=0)


@pytest.fixture
def check_one(command, start, run_command, uninterrupted, tmp_path):
    """Kill a training of this kind, resume it, and compare its end with the one nobody killed."""

    def check(data, processes, seed):
        out = tmp_path / "run"
        kill_at_random(start(command(data, out), processes), out, random.Random(seed))
        run_command(command(data, out), processes)
        assert_same_bits(out, uninterrupted(data, processes))

    return check


def assert_same_bits(out, expected):
    got = load_latest(out / "checkpoints")
    assert got.step == expected.step == STEPS
    assert set(got.groups) == {"model", "ema", "optimizer"}
    for group, tensors in expected.groups.items():
        assert got.groups[group].keys() == tensors.keys()
        assert all(torch.equal(got.groups[group][name], tensor) for name, tensor in tensors.items()), group


def test_a_killed_training_on_two_processes_resumes_to_the_same_bits(check_one):
    check_one("cifar10", 2, seed=102)  # one process: test_resume


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_twenty_kills_lose_nothing(check_one, seed):
    check_one(*KINDS[seed % 4], seed)
