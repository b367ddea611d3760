"""A training stopped and taken up again, and latents from an autoencoder in its real format, on a GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dispersive_kit.data.encode import encode
from dispersive_kit.data.latents import LatentStore
from dispersive_kit.evaluation import decoder_of, generate
from dispersive_kit.study.practice import practice
from dispersive_kit.training import RegularizerConfig, load_run, train, train_preset
from dispersive_kit.training.checkpoint import load_latest

CONFIG = train_preset("smoke", steps=12, checkpoint_every=5, regularizer=RegularizerConfig(preset="paper"))


def finished(folder, stop=0):
    """The tensors of a run that was stopped after step `stop`, if at all, and taken up again."""
    for record in train(CONFIG, folder) if stop else ():
        if record.step == stop:
            break
    for _ in train(CONFIG, folder, resume=True):
        pass
    groups = load_latest(folder / "checkpoints").groups
    return {f"{group}.{name}": v for group, tensors in groups.items() for name, v in tensors.items()}


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_stopped_run_ends_in_the_same_bits_with_deterministic_kernels_and_near_without(
    deterministic, tmp_path, capsys
):
    torch.use_deterministic_algorithms(deterministic)
    try:
        whole, resumed = finished(tmp_path / "whole"), finished(tmp_path / "stopped", stop=7)
    finally:
        torch.use_deterministic_algorithms(False)
    apart = max(
        float((resumed[k] - v).norm() / v.norm()) for k, v in whole.items() if k.startswith("model.") and v.any()
    )
    with capsys.disabled():
        print(f"\nresumed, deterministic kernels {deterministic}: a weight apart by {apart:.1e} of its norm at most")
    assert apart < 1e-2
    assert not deterministic or [k for k, v in whole.items() if not torch.equal(v, resumed[k])] == []


def test_encode_train_sample_and_decode(device, tmp_path):
    encoder = practice(tmp_path, per_class=4, shard_size=16)
    encode(encoder)
    encode(replace(encoder, store=tmp_path / "other", device=device))
    stores = [LatentStore(tmp_path / name) for name in ("store", "other")]
    assert stores[1].check()
    on_cpu, other = (store.read(np.arange(len(store))).double() for store in stores)
    assert (on_cpu - other).norm() < 1e-3 * on_cpu.norm()
    settings = {"data": str(stores[1].path), "steps": 4, "checkpoint_every": 4, "preview_images": 0, "batch_size": 8}
    for _ in train(train_preset("smoke", **settings), tmp_path / "run"):
        pass
    model, card = load_run(tmp_path / "run")
    labels = torch.from_numpy(stores[1].labels(np.arange(6)))
    images = generate(model.to(device), labels, num_steps=3, decode=decoder_of(card, device=device))
    assert images.shape == (6, 3, 32, 32) and images.float().std() > 0
