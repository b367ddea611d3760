"""Short trainings, for the tests of several rooms."""

import torch

from dispersive_kit.training import train
from dispersive_kit.training.checkpoint import load_latest


def run(config, folder, **options):
    """The folder of a whole training."""
    list(train(config, folder, **options))
    return folder


def stopped(config, folder, *, after):
    """The folder of a training that was left after so many steps."""
    for record in train(config, folder):
        if record.step == after:
            break
    return folder


def bytes_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def tensors(folder):
    return load_latest(folder / "checkpoints").groups


def assert_same_bits(a, b):
    """Of two runs' folders, or of their tensors."""
    a, b = (one if isinstance(one, dict) else tensors(one) for one in (a, b))
    assert {group: one.keys() for group, one in a.items()} == {group: one.keys() for group, one in b.items()}
    assert [(g, k) for g, one in a.items() for k, value in one.items() if not torch.equal(value, b[g][k])] == []
