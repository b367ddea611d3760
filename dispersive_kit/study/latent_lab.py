"""What the two notebooks on latents begin with: photographs and a small autoencoder, or the user's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dispersive_kit.data import to_uint8
from dispersive_kit.data.encode import EncodeConfig
from dispersive_kit.errors import ConfigError, DataError
from dispersive_kit.training.config import IMAGENET_ARMS, TrainConfig, train_preset
from dispersive_kit.training.small_autoencoder import train_small_autoencoder

PRACTICE_SIZE = 32  # pixels, which the small autoencoder turns into latents 4 x 8 x 8
IN_SCIKIT_IMAGE = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")


def practice(out: Path, settings: Any, *, seed: int = 0) -> EncodeConfig:
    """Photographs that come with packages, a small autoencoder trained on them here, and how one is encoded with the
    other. settings: per_class, vae_steps, shard_size.
    """
    images = _write_photographs(out / "images", per_class=settings.per_class, size=PRACTICE_SIZE)
    train_small_autoencoder(images, out / "vae", image_size=PRACTICE_SIZE, steps=settings.vae_steps, seed=seed)
    return EncodeConfig(
        images,
        str(out / "vae"),
        out / "store",
        image_size=PRACTICE_SIZE,
        shard_size=settings.shard_size,
        batch_size=8,
    )


def _write_photographs(folder: Path, *, per_class: int, size: int) -> Path:
    """Random square cuts of ten photographs, two to four times `size` wide, as PNG in a folder of each one's name."""
    from PIL import Image

    try:
        from skimage import data
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise DataError("the photographs need both: pip install 'dispersive-kit[notebooks,latents]'") from error
    china, flower = load_sample_images().images
    found = {name: getattr(data, name)() for name in IN_SCIKIT_IMAGE}
    found |= {"motorcycle": data.stereo_motorcycle()[0], "china": china, "flower": flower}
    rng = np.random.default_rng(0)
    for name, photograph in found.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            side = int(rng.integers(2 * size, min(4 * size, *photograph.shape[:2]) + 1))
            top, left = (int(rng.integers(length - side + 1)) for length in photograph.shape[:2])
            cut = Image.fromarray(photograph[top : top + side, left : left + side])
            cut.save(folder / name / f"{number:04d}.png", compress_level=1)
    return folder


def your_own(practised: EncodeConfig, images: str, vae: str) -> EncodeConfig:
    """As the command encodes `images` with `vae`; without both of them, the practice itself.

    Raises:
        ConfigError: one of the two only.
    """
    if not images and not vae:
        return practised
    if not (images and vae):
        raise ConfigError("give both, images and vae, or neither: the small autoencoder knows its photographs only")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return EncodeConfig(Path(images), vae, practised.store.with_name("your-store"), device=device)


def arm_configs(preset: str, store: Path, *, size: str, seed: int) -> dict[str, TrainConfig]:
    """The base and the regularised run on one store. preset: a name, in which {size} and {arm} are filled in."""
    return {
        arm: train_preset(
            preset.format(size=size.lower(), arm=arm), data=str(store), flip=True, seed=seed, regularizer=regularizer
        )
        for arm, regularizer in IMAGENET_ARMS.items()
    }


def latent_previews(run: Path, decode: Callable[[Tensor], Tensor], *, most: int = 6) -> dict[int, Tensor]:
    """Step -> the first ten of the samples that a run on latents drew at that checkpoint, decoded: uint8
    (10, 3, H, W); of at most `most` checkpoints spread over the run, the first and the last among them.
    """
    files = sorted((run / "previews").glob("step-*.safetensors"))
    chosen = sorted({round(i * (len(files) - 1) / (most - 1)) for i in range(most)})
    kept = {int(files[i].stem.partition("-")[2]): load_file(files[i])["samples"][:10] for i in chosen}
    return {step: to_uint8(decode(samples)) for step, samples in kept.items()}
