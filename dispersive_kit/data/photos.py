"""A folder of photographs of every kind, read one by one: listing, repair of the known oddities, ADM's crop."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dispersive_kit.errors import DataError


@dataclass(frozen=True)
class PhotoFolder:
    """The images below a root, sorted. The class of an image is the first folder below the root (ImageFolder)."""

    root: Path
    files: tuple[str, ...]  # relative to the root, with forward slashes
    classes: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the names: a folder that grew or shrank is another one."""
        return hashlib.sha256("\n".join(self.files).encode()).hexdigest()

    def label(self, file: str) -> int:
        return self.classes.index(_class_of(file))


def list_photos(root: Path) -> PhotoFolder:
    """The images of an ImageFolder, at any depth.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give one that holds a folder of images for each class")
    found = (f for f in root.rglob("*") if f.suffix.lower() in IMG_EXTENSIONS and f.is_file())
    files = tuple(sorted(f.relative_to(root).as_posix() for f in found))
    if not files:
        raise DataError(f"{root} holds no image ({', '.join(IMG_EXTENSIONS)}); give a folder that does")
    return PhotoFolder(root, files, tuple(sorted({_class_of(f) for f in files})))


def _class_of(file: str) -> str:
    first, slash, _ = file.partition("/")
    return first if slash else "image"  # a flat folder is one class


@dataclass(frozen=True)
class Photo:
    """One file as read: uint8 (3, S, S), or why it could not be; `oddities` are what had to be put right."""

    file: str
    pixels: Tensor | None
    oddities: tuple[str, ...] = ()
    fault: str = ""


def read_photo(root: Path, file: str, size: int) -> Photo:
    """Read, turn upright (EXIF), convert to RGB and crop; never raises for a bad file."""
    from PIL import Image, ImageOps

    path = root / file
    try:
        if path.stat().st_size == 0:
            return Photo(file, None, fault="empty file")
        with Image.open(path) as opened:
            upright: Any = ImageOps.exif_transpose(opened)
            odd = [opened.mode] if opened.mode != "RGB" else []
            turned = opened.getexif().get(0x0112, 1) != 1  # the orientation tag
            pixels = adm_crop(upright.convert("RGB"), size)
    # PIL raises SyntaxError, ValueError and struct.error too on damaged files, beside its documented OSError
    except Exception as error:
        return Photo(file, None, fault=f"{type(error).__name__}: {error}".replace(str(path), file))
    return Photo(file, pixels, (*odd, *(["EXIF-rotated"] if turned else [])))


def adm_crop(image: Any, size: int) -> Tensor:
    """ADM's centre crop of a PIL image, uint8 (3, S, S): halve with a box filter, then bicubic, then crop.

    Dhariwal & Nichol, "Diffusion Models Beat GANs" (arXiv 2105.05233), `center_crop_arr` of their code; DiT and SiT
    use the same.
    """
    from PIL import Image
    from torchvision.transforms.v2 import functional as tv

    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    cropped = tv.pil_to_tensor(image.crop((left, top, left + size, top + size)))
    return cropped.to(torch.uint8)
