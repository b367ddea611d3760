"""Stores of random latents, as large as asked, made without images; the benchmark and the training tests use it too."""

import hashlib

import numpy as np
import torch
from safetensors.torch import save_file

from dispersive_kit.data.autoencoders import AutoencoderCard
from dispersive_kit.data.encode import _mean_and_std, _moments
from dispersive_kit.data.latents import SPEC, LatentStore, ShardCard, Spec

CARD = AutoencoderCard("none", "None", "0" * 64, 0.18215, 0.0)


def write_store(folder, *, rows, shape=(4, 4, 4), classes=4, shard_size=100, flip=True, card=CARD, seed=0):
    """A store whose rows are standard normal with std 0.1, classes in turn; returns its folder."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    shards, sums = [], []
    for number, start in enumerate(range(0, rows, shard_size)):
        labels = torch.arange(start, min(start + shard_size, rows)) % classes
        x = torch.randn(len(labels), 1 + flip, *shape, generator=generator)
        posterior = torch.stack([x, torch.full_like(x, 0.1)], dim=2).half()
        file = folder / f"shard-{number:05d}.safetensors"
        save_file({"posterior": posterior, "labels": labels}, file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shards.append(ShardCard(file.name, len(labels), file.stat().st_size, digest))
        sums.append(_moments(posterior))
    mean, std = _mean_and_std(sums)
    spec = Spec(
        autoencoder=card,
        images={"root": "none", "files": rows, "names_sha256": "", "odd": {}, "left_out": []},
        image_size=8 * shape[-1],
        flip=flip,
        shape=shape,
        dtype="float16",
        encoding={"shard_size": shard_size, "batch_size": shard_size, "device": "cpu"},
        classes=tuple(f"n{i:02d}" for i in range(classes)),
        class_counts=tuple(np.bincount(np.arange(rows) % classes, minlength=classes).tolist()),
        channel_mean=mean,
        channel_std=std,
        shards=tuple(shards),
    )
    (folder / SPEC).write_text(spec.to_json())
    return LatentStore(folder).path
