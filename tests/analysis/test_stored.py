"""The numbers that come with the package: of the shipped weights, and made by the script of a checkout."""

import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dispersive_kit.analysis import LEVELS, gradient_pull, projection, stored
from dispersive_kit.errors import DataError
from dispersive_kit.evaluation import weights_sha256

SCRIPT = Path(__file__).parents[2] / "data" / "make_artefacts.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_artefacts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photos():
    return stored("analysis-cifar10.npz")


def test_they_are_of_the_shipped_weights_and_of_one_set_of_images(photos, script):
    for arm, run in script.CIFAR10.items():
        assert photos["protocol"][arm]["checkpoint_sha256"] == weights_sha256(script.model_of(run).state_dict())
    assert len({(one["sha256"], one["images"]) for one in photos["protocol"].values()}) == 1


def test_every_map_is_there_and_finite_and_the_rows_have_their_spectrum_and_pictures(photos, script):
    for arm in (*script.CIFAR10, "random weights"):
        for name in ("rankme", "feature_rms", "two_nn"):
            value = photos[f"sweeps/{arm}/values/{name}"]
            assert value.shape == (len(LEVELS), 4) and value.isfinite().all() and value.dtype == torch.double
    for arm in script.CIFAR10:
        rows, spectra = photos[f"sweeps/{arm}/rows"], photos[f"sweeps/{arm}/spectra"]
        assert rows.shape == (4, 400, 96) and photos[f"signal/{arm}"].shape == (5, 4)
        variance = rows.var(1).sum(-1)  # (blocks,), of 400 of the 2,000 images
        assert torch.allclose(variance, spectra[LEVELS.index(2.0)].sum(-1), rtol=0.15)
        assert projection.trustworthiness(rows[-1], photos[f"pictures/{arm}/15/0.1/0"].numpy()) > 0.7


def test_a_file_that_is_not_listed_is_refused():
    with pytest.raises(DataError, match="no artefact"):
        stored("none.npz")


def test_the_classroom_file_is_made_from_the_shipped_runs(script):
    """Its images are those that are drawn today, up to the last bits of another machine."""
    kept = stored("classroom.npz")["guided/digits/base/2"][:4].int()
    assert (script.samples("digits-base", 2.0, 4).int() - kept).abs().float().mean() < 2


@pytest.mark.long
def test_the_script_makes_the_numbers_that_are_shipped(photos, script, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (400, 32, 32, 3), dtype=np.uint8)
    label, split = np.arange(400) % 10, np.arange(400) // 250
    np.savez(tmp_path / "cifar10.npz", images=noise, labels=label, split=split, classes=np.array(list("abcdefghij")))
    monkeypatch.setenv("DISPERSIVE_KIT_DATA", str(tmp_path))
    sizes = {"map": 64, "kept": 40, "noised": 10, "train": 40, "validation": 20, "test": 30}
    monkeypatch.setattr(script, "SIZES", sizes)
    monkeypatch.setattr(script, "gradient_pull", partial(gradient_pull, batches=1))
    monkeypatch.setattr(script, "UMAPS", [])  # no pictures: numba compiles for a minute
    made = script.cifar10()
    wanted = {name for name in photos if not name.startswith("pictures/")}
    assert made.keys() <= wanted and made["sweeps/base/rows"].shape[:2] == (2, 40)
    for name in made.keys() - {"protocol", "probes/sets"}:
        assert made[name].dtype.kind == photos[name].numpy().dtype.kind, name
    assert all(value[0] < 0.5 for name, value in made.items() if name.startswith("probes/tested"))
