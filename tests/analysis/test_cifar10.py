"""The analysis of the CIFAR-10 runs that comes with the package: of these weights, and made by the command it names."""

from functools import partial

import numpy as np
import pytest
import torch

from dispersive_kit.analysis import LEVELS, cifar10, gradient_pull, projection
from dispersive_kit.errors import DataError


@pytest.fixture(scope="module")
def stored():
    return cifar10.load()


def test_it_is_of_the_shipped_weights_and_of_one_set_of_images(stored):
    for arm, digest in cifar10.weights_here().items():
        assert stored.sweeps[arm].protocol["checkpoint_sha256"] == digest
    assert len({one.protocol["sha256"] for one in stored.sweeps.values()}) == 1
    assert all(one.protocol["images"] == cifar10.IMAGES for one in stored.sweeps.values())


def test_every_map_is_there_and_finite(stored):
    assert stored.sweeps.keys() == {*cifar10.ARMS, cifar10.RANDOM}
    for one in stored.sweeps.values():
        assert one.levels == LEVELS and one.rows.shape == (4, cifar10.KEPT, 96)
        for name, value in (*one.values.items(), *one.gaussian.items()):
            assert value.shape == (6, 4) and value.isfinite().all(), name
    assert stored.between.shape == (6, 4, 4) and all(one.shape == (5, 4) for one in stored.signal.values())
    assert all(pull.ratio.shape == (4, 4) for pull in stored.pulls.values())
    assert {len(points) for points in stored.pictures.values()} == {cifar10.KEPT}


def test_the_stored_rows_have_the_stored_spectrum_and_their_pictures(stored):
    for arm in cifar10.ARMS:
        one = stored.sweeps[arm]
        variance = one.rows.double().var(1).sum(-1)  # (blocks,), of 400 of the 2,000 images
        assert torch.allclose(variance, one.spectra[cifar10.LEVEL].sum(-1), rtol=0.15)
        picture = stored.pictures[f"{arm}/15/0.1/0"]
        assert projection.trustworthiness(one.rows[-1], picture) > 0.7


def test_a_file_that_is_not_listed_is_refused(monkeypatch):
    monkeypatch.setattr(cifar10, "FILE", "none.npz")
    with pytest.raises(DataError, match="no artefact"):
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
    for name, value in {**small, "NEIGHBOURS": ()}.items():
        monkeypatch.setattr(cifar10, name, value)  # no pictures: numba compiles for a minute
    cifar10.save(cifar10.make(tmp_path), tmp_path / "made.npz")
    made = cifar10.load(tmp_path / "made.npz")
    assert made.sweeps["base"].rows.shape == (4, 40, 96) and made.pictures == {}
    assert made.tested.keys() == {*cifar10.ARMS, cifar10.RANDOM, "raw pixels", "patch PCA", "shuffled labels"}
    assert all(one.accuracy < 0.5 for one in made.tested.values()) and 0 <= made.mcnemar <= 1
