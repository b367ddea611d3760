# ruff: noqa: F401
"""All that the golden tests touch of the kit, in one place: where a name moves, this file follows and no other.

As a script it trains the configurations of a JSON file, one after the other: `kit.py CONFIGS FOLDER`, for torchrun.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dispersive_kit.data.autoencoders import register_autoencoder
from dispersive_kit.data.encode import Encoder, encode
from dispersive_kit.data.latents import LatentStore
from dispersive_kit.diffusion import samplers
from dispersive_kit.diffusion.guidance import ClassifierFree
from dispersive_kit.diffusion.objectives import DDPM, FlowMatching, MeanFlow
from dispersive_kit.diffusion.paths import DDPMPath, GVPPath, LinearPath, VPPath
from dispersive_kit.errors import DispersiveError, KitError
from dispersive_kit.models.dit import DIT_CONFIGS, DiT
from dispersive_kit.models.mlp import MLP
from dispersive_kit.regularizers.attach import Dispersive
from dispersive_kit.regularizers.losses import KINDS, dispersive_loss, floor
from dispersive_kit.regularizers.rivals import REPA, LayerSync, NormMatched
from dispersive_kit.regularizers.taps import Schedule
from dispersive_kit.study.notebook import read_result
from dispersive_kit.study.plan import load_plan, shipped_plans
from dispersive_kit.study.report import read_task
from dispersive_kit.study.verdict import shipped_results, verdicts
from dispersive_kit.training.checkpoint import load_latest
from dispersive_kit.training.config import TrainConfig, train_preset, with_settings
from dispersive_kit.training.runs import load_run, read_config, read_metrics, sample_batch
from dispersive_kit.training.train import train


def config(preset: str, **settings: Any) -> TrainConfig:
    """A preset changed by settings as `--set` has them; "regularizer.preset" and its like go by a dict."""
    return with_settings(train_preset(preset), settings)


def all_settings(of: TrainConfig) -> dict[str, Any]:
    return json.loads(of.model_dump_json())


def train_all(configs: list[TrainConfig], folder: Path) -> None:
    for number, one in enumerate(configs):
        for _ in train(one, folder / str(number)):
            pass


# So small that a run of it can be kept beside the tests, and one to train in a second.
DIT_CONFIGS["DiT-tiny"] = {"depth": 2, "hidden_size": 8, "num_heads": 2}
DIT_CONFIGS["DiT-short"] = {"depth": 4, "hidden_size": 32, "num_heads": 2}


def sample_run(run: str | Path, n: int = 3) -> torch.Tensor:
    model, card = load_run(run)
    objective = card["config"].objective
    return sample_batch(model, torch.arange(n), range(n), objective=objective, num_steps=3)


@register_autoencoder("golden-patches")
class Patches:
    """Mean and spread of every 8 x 8 patch, by channel."""

    scale, shift = 0.5, 0.25

    def encode(self, x):
        patches = x.unfold(2, 8, 8).unfold(3, 8, 8)
        return patches.mean((-1, -2)), patches.std((-1, -2))

    def decode(self, z):
        return z.repeat_interleave(8, 2).repeat_interleave(8, 3)


def write_store(folder: Path) -> Path:
    """Seven small photographs of noise, encoded into two shards; returns the store."""
    rng = np.random.default_rng(0)
    for i in range(7):
        file = folder / "photos" / f"n0{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file)
    how = {"image_size": 16, "shard_size": 4, "batch_size": 3}
    return encode(Encoder(folder / "photos", "golden-patches", folder / "store", **how)).path


def store_bytes(store: Path) -> dict[str, Any]:
    """sha256 of each shard, and spec.json without the place of the images and the hash over all."""
    found = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(store.glob("*.safetensors"))}
    spec = json.loads((store / "spec.json").read_text())
    spec["images"].pop("root"), spec.pop("spec_sha256")
    return {"shards": found, "spec": spec}


def read_store(store: Path) -> torch.Tensor:
    """Posteriors of all rows, as they are, then mirrored."""
    opened = LatentStore(store)
    rows = np.arange(7)
    return torch.cat([opened.read(rows, np.full(7, mirrored)) for mirrored in (False, True)])


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv[1]).read_text())
    train_all([TrainConfig.from_json(json.dumps(one)) for one in settings], Path(sys.argv[2]))
