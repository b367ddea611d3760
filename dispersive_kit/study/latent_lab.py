"""What the two notebooks on latents begin with: images, an autoencoder, and how to encode one with the other."""

from pathlib import Path
from typing import Any

from dispersive_kit.data.encoder import EncodeConfig
from dispersive_kit.data.photographs import write_photographs
from dispersive_kit.training.config import IMAGENET_ARMS, TrainConfig, train_preset
from dispersive_kit.training.small_autoencoder import train_small_autoencoder


def encode_settings(out: Path, settings: Any, *, images: str = "", vae: str = "", seed: int = 0) -> EncodeConfig:
    """Of the user's images and autoencoder where they are named; else of photographs that come with packages, and
    of a small autoencoder trained on them here. settings: image_size, per_class, vae_steps, shard_size, device.
    """
    size = settings.image_size
    folder = Path(images) if images else write_photographs(out / "images", per_class=settings.per_class, size=size)
    if not vae:
        vae = str(out / "vae")
        train_small_autoencoder(folder, Path(vae), image_size=size, steps=settings.vae_steps, seed=seed)
    return EncodeConfig(
        folder,
        vae,
        out / "store",
        image_size=size,
        shard_size=settings.shard_size,
        batch_size=8,
        device=settings.device,
    )


def arm_configs(preset: str, store: Path, *, size: str, seed: int) -> dict[str, TrainConfig]:
    """The base and the regularised run on one store. preset: a name, in which {size} and {arm} are filled in."""
    return {
        arm: train_preset(
            preset.format(size=size.lower(), arm=arm), data=str(store), flip=True, seed=seed, regularizer=regularizer
        )
        for arm, regularizer in IMAGENET_ARMS.items()
    }
