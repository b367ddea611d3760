"""Samples in the form of ADM's evaluation suite: written, read back, and refused by name where they are not."""

import numpy as np
import pytest
import torch

from dispersive_kit.errors import DataError
from dispersive_kit.evaluation.export import load_npz, save_npz


def test_samples_are_arr_0_with_channels_last_and_come_back_as_they_were(tmp_path):
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_npz(images, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as arrays:
        assert list(arrays) == ["arr_0"] and arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"][2, 1, 3], images[2, :, 1, 3].numpy())
    assert torch.equal(load_npz(tmp_path / "samples.npz"), images)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "float32"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"\(2, 3, 4, 4\)"),
        (np.zeros((2, 4, 4), np.uint8), "N, H, W, 1 or 3"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, words):
    np.savez(tmp_path / "other.npz", array)
    with pytest.raises(DataError, match=words):
        load_npz(tmp_path / "other.npz")


def test_a_file_without_samples_is_named(tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("statistics.npz", "text.npz", "none.npz"):
        with pytest.raises(DataError, match=f"{name} holds no samples"):
            load_npz(tmp_path / name)
