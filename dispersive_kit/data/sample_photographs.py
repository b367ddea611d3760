"""Ten photographs that come inside scikit-image and scikit-learn, cut into a folder of images: a class a photograph."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dispersive_kit.errors import DataError

IN_SCIKIT_IMAGE = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")


def photographs() -> dict[str, NDArray[np.uint8]]:
    """Name -> uint8 (H, W, 3).

    Raises:
        DataError: one of the two packages is missing.
    """
    try:
        from skimage import data
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise DataError("the photographs need both: pip install 'dispersive-kit[notebooks,latents]'") from error
    found = {name: getattr(data, name)() for name in IN_SCIKIT_IMAGE}
    china, flower = load_sample_images().images
    return {**found, "motorcycle": data.stereo_motorcycle()[0], "china": china, "flower": flower}


def write_photographs(folder: Path, *, per_class: int, size: int, seed: int = 0) -> Path:
    """Random square cuts of each photograph, two to four times `size` wide, as PNG in a folder of its name."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for name, photograph in photographs().items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            side = int(rng.integers(2 * size, min(4 * size, *photograph.shape[:2]) + 1))
            top, left = (int(rng.integers(length - side + 1)) for length in photograph.shape[:2])
            cut = Image.fromarray(photograph[top : top + side, left : left + side])
            cut.save(folder / name / f"{number:04d}.png", compress_level=1)
    return folder
