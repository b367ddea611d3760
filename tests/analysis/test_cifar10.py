"""The analysis of the CIFAR-10 runs: the command makes what `load` reads."""

from functools import partial

import numpy as np
import pytest

from dispersive_kit.analysis import cifar10, gradient_pull
from dispersive_kit.errors import DataError


def test_a_missing_file_is_said_with_the_cure(monkeypatch):
    monkeypatch.setattr(cifar10, "FILE", "none.npz")
    with pytest.raises(DataError, match="command its module names"):
        cifar10.load()


def test_names_nest_and_unnest():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert cifar10.flat(tree) == {"a/b": 1, "a/c/d": 2, "e": 3} and cifar10.nested(cifar10.flat(tree)) == tree


def test_the_command_makes_what_load_reads(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (400, 32, 32, 3), dtype=np.uint8)
    label, split = np.arange(400) % 10, np.arange(400) // 250
    np.savez(tmp_path / "cifar10.npz", images=noise, labels=label, split=split, classes=np.array(list("abcdefghij")))
    small = {"IMAGES": 64, "KEPT": 40, "NOISED": 10, "TRAIN": 40, "VALIDATION": 20, "TEST": 30, "DRAWS": 2}
    monkeypatch.setattr(cifar10, "gradient_pull", partial(gradient_pull, batches=1))
    for name, value in {**small, "NEIGHBOURS": (), "FILE": str(tmp_path / "made.npz")}.items():
        monkeypatch.setattr(cifar10, name, value)  # no pictures: numba compiles for a minute
    cifar10.save(cifar10.make(tmp_path))
    made = cifar10.load()
    assert made.sweeps["base"].rows.shape == (4, 40, 96) and made.pictures == {}
    assert made.tested.keys() == {*cifar10.ARMS, cifar10.RANDOM, "raw pixels", "patch PCA", "shuffled labels"}
    assert all(one.accuracy < 0.5 for one in made.tested.values()) and 0 <= made.mcnemar <= 1
