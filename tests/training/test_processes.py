import json
import subprocess
import sys

import pytest

from dispersive_kit.training import RegularizerConfig, train, train_preset

TRAIN = ["-m", "dispersive_kit.cli", "train", "--preset", "smoke", "--steps", "5", "--regularizer"]


@pytest.mark.parametrize("regularizer", ["none", "paper"])
def test_two_processes_train_as_one_but_for_the_dispersion_batch(tmp_path, regularizer):
    one, two = tmp_path / "one", tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    list(train(train_preset("smoke", steps=5, regularizer=RegularizerConfig(preset=regularizer)), one))
    subprocess.run([*launch, *TRAIN, regularizer, "--out", two], check=True, capture_output=True)
    a, b = (json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (one, two))
    assert (a["batch_size"], b["batch_size"]) == (32, 16)
    if regularizer == "none":
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["held_out"] == pytest.approx(a["held_out"], rel=1e-5)
    else:  # the loss is a property of the local batch
        assert b["floor"] != a["floor"] and b["held_out"] != a["held_out"]
