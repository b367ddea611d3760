"""Folders of image files of many kinds: listing, conversion of each file to upright RGB, ADM's crop."""

import hashlib
import io
import os
import re
import stat
import warnings
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dispersive_kit.data.files import reading
from dispersive_kit.errors import ConfigError, DataError

HELD_OUT_PARTS = ("test", "val", "valid", "validation")
PARTS = ("train", *HELD_OUT_PARTS)  # names of folders that are no classes, in small or capital letters
ON_WHITE = "transparent, put on white"
PROGRAM_MADE = ("__macosx", "@eadir", "__pycache__", "#recycle", "$recycle.bin", "system volume information")


@dataclass(frozen=True)
class ImageFolder:
    """The images below a root, sorted. The class of an image is the first folder below the root."""

    root: Path
    files: tuple[str, ...]  # relative to the root, with forward slashes
    classes: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of the file names: it changes if a file is added or removed."""
        return hashlib.sha256("\n".join(self.files).encode(errors="surrogateescape")).hexdigest()

    def label(self, file: str) -> int:
        return self.classes.index(_class_of(file))


def list_images(root: Path) -> ImageFolder:
    """The images of a folder, at any depth. Links to files and folders are followed, and each file is listed once.

    Hidden names, names made by programs, and all but regular files are skipped; a warning says how many.
    Raises DataError: no such folder, no image in it, one that cannot be listed, or only train/, test/ and the like.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give one that holds a folder of images for each class")
    files, skipped = _walk(root, IMG_EXTENSIONS)
    if said := ", ".join(f"{count:,} {kind}" for kind, count in skipped.items() if count):
        warnings.warn(f"{root}: skipped {said}", stacklevel=2)
    if not files:
        raise DataError(f"{root} holds no image ({', '.join(IMG_EXTENSIONS)}); give a folder that does")
    classes = tuple(sorted({_class_of(f) for f in files}))
    if {name.lower() for name in classes} <= set(PARTS):
        raise DataError(
            f"{root} holds {', '.join(f'{name}/' for name in classes)}: these are parts of a data set and not its "
            f"classes. Give {root / classes[0]}; to train, {root} may hold train/ and test/ or val/"
        )
    return ImageFolder(root, tuple(sorted(files)), classes)


def _walk(root: Path, endings: tuple[str, ...]) -> tuple[list[str], Counter[str]]:
    """Names of the images, and how many names of each kind were skipped. Links come last: a file keeps its own name."""
    files: list[str] = []
    skipped, seen = Counter[str](), set[tuple[int, int]]()
    real, links = deque([""]), deque[str]()
    while real or links:
        name = (real or links).popleft()
        path, is_image = root / name, name.lower().endswith(endings)
        with reading(path):
            if path.is_symlink() and not path.exists():  # a broken link: read_image reports it
                files += [name] * is_image
                continue
            found = path.stat()
            below = sorted(os.scandir(path), key=lambda entry: entry.name) if stat.S_ISDIR(found.st_mode) else []
        if (found.st_dev, found.st_ino) in seen:
            skipped["links to files or folders that are listed already"] += 1
        elif stat.S_ISREG(found.st_mode):
            files += [name] * is_image
        elif not stat.S_ISDIR(found.st_mode):
            skipped["special files with image names"] += is_image
        else:
            for entry in below:
                if entry.name.startswith(".") or entry.name.lower() in PROGRAM_MADE:
                    skipped["names that are hidden or made by a program"] += 1
                else:
                    (links if entry.is_symlink() else real).append(f"{name}/{entry.name}" if name else entry.name)
        seen.add((found.st_dev, found.st_ino))
    return files, skipped


def _class_of(file: str) -> str:
    first, slash, _ = file.partition("/")
    if not slash:
        return "image"  # a flat folder is one class
    return first if first.isprintable() else repr(first)[1:-1]  # what is not UTF-8 can be opened, but not printed


@dataclass(frozen=True)
class ImageFile:
    """One image file: pixels uint8 (3, S, S), or None and the `fault`; `oddities` lists what was converted."""

    file: str
    pixels: Tensor | None
    oddities: tuple[str, ...] = ()
    fault: str = ""


def read_image(root: Path, file: str, size: int) -> ImageFile:
    """Read, turn upright (EXIF), convert to RGB (transparency on white) and crop. A damaged file has a `fault`.

    Raises DataError: the disk cannot be read; then the file is not left out. ConfigError: size below 1.
    """
    if size < 1:
        raise ConfigError(f"image_size must be above 0, got {size}")
    path = root / file
    with reading(path):
        if path.is_symlink() and not path.exists():
            return ImageFile(file, None, fault="link to a file that is not there")
        content = path.read_bytes()
    try:
        image, odd = _upright_rgb(content)
    except MemoryError:
        raise
    except Exception as error:  # PIL documents OSError; damaged files raise SyntaxError, struct.error and more
        said = re.sub(r" <_io.*?>", "", str(error))  # a memory address is different each time
        return ImageFile(file, None, fault=f"{type(error).__name__}: {said}" if content else "empty file")
    return ImageFile(file, _adm_crop(image, size), odd)


def _upright_rgb(content: bytes) -> tuple[Any, tuple[str, ...]]:
    """The image as upright RGB, and what was converted."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as opened:
        image: Any = ImageOps.exif_transpose(opened)
        odd = [opened.mode] if opened.mode != "RGB" else []
        odd += ["EXIF-rotated"] if opened.getexif().get(0x0112, 1) != 1 else []  # the orientation tag
        if image.mode.startswith("I;16"):  # PIL's own conversion to RGB would make it white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"32 bits a pixel (mode {image.mode}), of which nobody knows what is white")
        if image.has_transparency_data and (image := image.convert("RGBA")).getextrema()[3][0] < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            odd.append(ON_WHITE)
        return image.convert("RGB"), tuple(odd)


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
