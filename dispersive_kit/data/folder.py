"""A folder of images of every kind, read one by one: listing, repair of the known oddities, ADM's crop."""

import hashlib
import io
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dispersive_kit.errors import DataError

WAITS_S = (1, 10, 60)  # before a disk that failed is asked again: a network folder may be away for a while
HELD_OUT_PARTS = ("test", "val", "valid", "validation")
PARTS = ("train", *HELD_OUT_PARTS)  # names of folders that are no classes


@dataclass(frozen=True)
class ImageFolder:
    """The images below a root, sorted. The class of an image is the first folder below the root."""

    root: Path
    files: tuple[str, ...]  # relative to the root, with forward slashes
    classes: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the names: a folder that grew or shrank is another one."""
        return hashlib.sha256("\n".join(self.files).encode()).hexdigest()

    def label(self, file: str) -> int:
        return self.classes.index(_class_of(file))


def list_images(root: Path) -> ImageFolder:
    """The images of a folder, at any depth, through links to folders too, as torchvision's ImageFolder finds them.

    Raises:
        DataError: there is no such folder, or no image in it; its folders are train/, test/ and the like.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give one that holds a folder of images for each class")
    files: list[str] = []
    for folder, _, names in os.walk(root, followlinks=True):
        below = "" if Path(folder) == root else f"{Path(folder).relative_to(root).as_posix()}/"
        files += [below + name for name in names if name.lower().endswith(IMG_EXTENSIONS)]
    if not files:
        raise DataError(f"{root} holds no image ({', '.join(IMG_EXTENSIONS)}); give a folder that does")
    classes = tuple(sorted({_class_of(f) for f in files}))
    if set(classes) <= set(PARTS):
        raise DataError(
            f"{root} holds {', '.join(f'{name}/' for name in classes)}: these are parts of a data set and not its "
            f"classes. Give {root / classes[0]}; to train, {root} may hold train/ and test/ or val/"
        )
    return ImageFolder(root, tuple(sorted(files)), classes)


def _class_of(file: str) -> str:
    first, slash, _ = file.partition("/")
    return first if slash else "image"  # a flat folder is one class


@dataclass(frozen=True)
class ImageFile:
    """One file as read: uint8 (3, S, S), or why it could not be; `oddities` are what had to be put right."""

    file: str
    pixels: Tensor | None
    oddities: tuple[str, ...] = ()
    fault: str = ""


def read_image(root: Path, file: str, size: int) -> ImageFile:
    """Read, turn upright (EXIF), convert to RGB and crop. A damaged file is no error: its `fault` says what it is.

    Raises:
        DataError: the disk is at fault and not the file, also when asked again after a while.
    """
    path = root / file
    if path.is_symlink() and not path.exists():
        return ImageFile(file, None, fault="link to a file that is not there")
    content = _read_patiently(path)
    if not content:
        return ImageFile(file, None, fault="empty file")
    try:
        return ImageFile(file, *_decode(content, size))
    except MemoryError:
        raise
    # PIL raises SyntaxError, ValueError and struct.error too on damaged files, beside its documented OSError
    except Exception as error:
        said = re.sub(r" <_io.*?>", "", str(error))  # an address in memory is another one each time
        return ImageFile(file, None, fault=f"{type(error).__name__}: {said}")


def _read_patiently(path: Path) -> bytes:
    for wait in (0, *WAITS_S):
        time.sleep(wait)
        try:
            return path.read_bytes()
        except OSError as error:
            failure = error
    raise DataError(
        f"{path} could not be read: {failure.strerror}. That says nothing of the image, so it was not left out. "
        "What is finished stays: see to the disk, and give the command again"
    ) from failure


def _decode(content: bytes, size: int) -> tuple[Tensor, tuple[str, ...]]:
    """Pixels, and what had to be put right."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as opened:
        image: Any = ImageOps.exif_transpose(opened)
        odd = (opened.mode,) if opened.mode != "RGB" else ()
        turned = ("EXIF-rotated",) if opened.getexif().get(0x0112, 1) != 1 else ()  # the orientation tag
        if image.mode.startswith("I;16"):  # which PIL's own conversion to RGB makes white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"32 bits a pixel (mode {image.mode}), of which nobody knows what is white")
        return _adm_crop(image.convert("RGB"), size), (*odd, *turned)


def _adm_crop(image: Any, size: int) -> Tensor:
    """ADM's centre crop of a PIL image, uint8 (3, S, S): halve with a box filter, then bicubic, then crop.

    Dhariwal & Nichol (arXiv 2105.05233), `center_crop_arr` of their code; DiT and SiT use the same.
    """
    from PIL import Image
    from torchvision.transforms.v2 import functional as tv

    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return tv.pil_to_tensor(image.crop((left, top, left + size, top + size)))
