"""A replacement for ImageNet and its autoencoder: photographs that come with packages, and a small AutoencoderKL that
`data/make_artefacts.py` trained on them.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from dispersive_kit.data.encode import Encoder
from dispersive_kit.data.files import ARTEFACTS
from dispersive_kit.errors import DataError

AUTOENCODER = ARTEFACTS / "autoencoders" / "photographs"  # 4 x 4 pixels become one position with 4 channels
_SIZE = 64  # pixels
_IN_SCIKIT_IMAGE = {
    "astronaut": "astronaut", "cat": "chelsea", "cup": "coffee", "galaxies": "hubble_deep_field",
    "tissue": "immunohistochemistry", "retina": "retina", "rocket": "rocket",
}  # fmt: skip


def practice(out: Path, *, per_class: int, shard_size: int) -> Encoder:
    """Write crops of the photographs to `out`, a class each; returns how to encode them. Raises DataError: as below."""
    images, rng = out / "images", np.random.default_rng(0)
    for name, photograph in photographs().items():
        (images / name).mkdir(parents=True, exist_ok=True)
        shortest = min(photograph.shape[:2])
        for number in range(per_class):  # large crops, so that the content can be recognised
            side = int(rng.integers(round(0.85 * shortest), shortest + 1))
            top, left = (int(rng.integers(length - side + 1)) for length in photograph.shape[:2])
            cut = Image.fromarray(photograph[top : top + side, left : left + side])
            small = cut.resize((2 * _SIZE, 2 * _SIZE), Image.Resampling.BOX)
            small.save(images / name / f"{number:04d}.png", compress_level=1)
    return Encoder(images, str(AUTOENCODER), out / "store", image_size=_SIZE, shard_size=shard_size, batch_size=8)


def photographs() -> dict[str, np.ndarray]:
    """Ten photographs by name, uint8 (H, W, 3). Raises DataError: scikit-image or scikit-learn is not installed."""
    try:
        from skimage import data
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise DataError("the photographs need two packages: pip install 'dispersive-kit[notebooks,latents]'") from error
    china, flower = load_sample_images().images
    found = {name: getattr(data, function)() for name, function in _IN_SCIKIT_IMAGE.items()}
    return found | {"motorcycle": data.stereo_motorcycle()[0], "temple": china, "flower": flower}
