"""Two real gloo processes against one: the same samples, features, moments and numbers."""

import os
import subprocess
import sys

import pytest
import torch

from dispersive_kit.errors import ConfigError, KitError
from dispersive_kit.evaluation import generate, processes
from dispersive_kit.evaluation.processes import check_equal_everywhere, shared_out
from dispersive_kit.training import load_run, shipped

EVALUATE = ["evaluate", "digits-base", "--num", "300", "--num-steps", "2", "--extractor", "pixels-pca32"]


def run(launch, out):
    command = [sys.executable, *launch, "-m", "dispersive_kit.cli", *EVALUATE, "--resamples", "10", "--out", out]
    if launch:  # torchrun takes --num for one of its own options without the mark that its own have ended
        command.insert(command.index("evaluate"), "--")
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun sets it
    return subprocess.run(command, env=one_thread, check=True, capture_output=True, text=True).stdout


def test_two_processes_write_the_file_of_one_and_print_it_once(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    printed = run(launch, tmp_path / "two.json")
    run([], tmp_path / "one.json")
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert printed.count("FD[pixels/pca32, N=300]") == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_batches_are_dealt_out_once_each_whatever_the_count(monkeypatch, count):
    dealt = []
    for rank in range(count):
        state = type("State", (), {"process_index": rank, "num_processes": count})()
        monkeypatch.setattr(processes, "this_process", lambda state=state: state)
        monkeypatch.setattr(processes, "_gathered", lambda own: own)
        dealt += shared_out(lambda rows: (rows.start, rows.stop), 10, 4)
    assert sorted(dealt) == [(0, 4), (4, 8), (8, 10)]


def test_processes_with_different_extractors_are_stopped(monkeypatch):
    monkeypatch.setattr(processes, "_gathered", lambda own: [*own, "another"])
    with pytest.raises(KitError, match="the extractor differs between the processes"):
        check_equal_everywhere("the extractor", "one")


def test_guidance_in_no_interval_is_no_guidance():
    model, _ = load_run(shipped("digits-base"))
    labels = torch.arange(6)
    plain, nowhere, guided, part = (
        generate(model, labels, num_steps=3, **options)
        for options in (
            {},
            {"cfg_scale": 3.0, "guidance_low": 0.4, "guidance_high": 0.6},
            {"cfg_scale": 3.0},
            {"cfg_scale": 3.0, "guidance_low": 0.5},
        )
    )
    assert torch.equal(plain, nowhere)  # none of the times 1, 2/3, 1/3 and 0 lies in there
    assert not torch.equal(plain, guided) and not torch.equal(part, guided)
    with pytest.raises(ConfigError, match=r"0\.\.9"):
        generate(model, torch.tensor([10]))
