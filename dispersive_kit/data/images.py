"""Small image sets held whole in memory as uint8: digits, MNIST, CIFAR-10, or any folder of images.

The only conversions between uint8 and the network's [-1, 1] are `to_float` and `to_uint8`.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dispersive_kit.data.files import list_folder
from dispersive_kit.data.folder import HELD_OUT_PARTS, list_images, read_image
from dispersive_kit.data.toy import TOY_SETS
from dispersive_kit.errors import DataError

DIGITS = tuple(str(i) for i in range(10))
DIGITS_HELD_OUT = 500  # of the 1,797 images; fixed, so that numbers from different runs can be compared
TORCHVISION_SETS = {  # name -> its own files
    "mnist": "MNIST/raw/ with the four *-ubyte files",
    "cifar10": "cifar-10-batches-py/ (the unpacked cifar-10-python.tar.gz)",
}


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set; DataError if images, labels and classes do not fit together."""

    name: str
    split: str
    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)
    classes: tuple[str, ...]  # name of each label
    source: str  # where it was read from
    resize: str = "none"  # what was done to the files, in words
    drawn_from: int | None = None  # size of the full set, if these images were drawn from it

    def __post_init__(self) -> None:
        x, y, top = self.images, self.labels, len(self.classes) - 1
        if x.dtype != torch.uint8 or x.ndim != 4 or len(x) == 0 or y.shape != x.shape[:1]:
            raise DataError(
                f"{self.source}: images must be uint8 (N, C, H, W) and labels (N,), with N at least 1; got {x.dtype} "
                f"{tuple(x.shape)} and {tuple(y.shape)}"
            )
        if y.min() < 0 or y.max() > top:
            raise DataError(f"{self.source}: labels run from {y.min()} to {y.max()}, and must lie in 0..{top}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sha256(self) -> str:
        """Hash of images and labels, so that a result can name its data."""
        return hashlib.sha256(self.images.numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest()

    def subset(self, index: Tensor) -> "ImageSet":
        return replace(self, images=self.images[index], labels=self.labels[index])


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8: round(127.5 x + 127.5), clamped; DataError for NaN or infinity."""
    if wrong := int((~x.isfinite()).sum()):
        raise DataError(f"{wrong:,} of {x.numel():,} values are NaN or infinite: they are no picture")
    return (127.5 * x + 127.5).round().clamp(0, 255).to(torch.uint8)


def data_folder() -> Path:
    """Where data sets are looked for: $DISPERSIVE_KIT_DATA, else `data/` of a checkout, else the user cache."""
    checkout, cache = Path(__file__).resolve().parents[2], Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    own = checkout / "data" if (checkout / "pyproject.toml").is_file() else cache / "dispersive_kit" / "data"
    try:
        return Path(os.environ.get("DISPERSIVE_KIT_DATA") or own).expanduser()
    except RuntimeError as error:  # a user id without a home
        raise DataError(f"{error} Set DISPERSIVE_KIT_DATA to the folder where data sets are") from error


def load_images(
    name: str, split: str = "train", *, data_dir: str | Path | None = None, download: bool = True, size: int = 32
) -> ImageSet:
    """Load one split of a data set by name, or a folder of images by path.

    name: "digits" (8x8) and "photos" (32x32 crops of two photographs), both inside scikit-learn, "mnist", "cifar10",
    or the path of a folder of images. split: "train" or "test". A folder may hold `train/` and one of `test/`, `val/`,
    `valid/` and `validation/`, whose classes are those of `train/`; otherwise every tenth image is held out.
    data_dir: folder of mnist and cifar10; `data_folder()` if not given. `NAME.npz` is preferred, then torchvision's
    own files, which may be downloaded. size: side to which images of a folder are resized and cropped.
    Raises DataError: unknown name or split; damaged file; not there (the message says where to put it).
    """
    if split not in ("train", "test"):
        raise DataError(f"unknown split {split!r}; there are: train, test")
    if is_named_set(name) and name in BUNDLED_SETS:
        return BUNDLED_SETS[name](split)
    folder = Path(data_dir) if data_dir else data_folder()
    if name in TORCHVISION_SETS:
        packed = folder / f"{name}.npz"
        return _packed(name, split, packed) if packed.is_file() else _torchvision(name, split, folder, download)
    if Path(name).is_dir():
        return _image_folder(Path(name), split, size)
    known = ", ".join([*BUNDLED_SETS, *TORCHVISION_SETS])
    raise DataError(f"unknown data set {name!r}: it is neither one of {known} nor a folder of images")


def is_named_set(name: str) -> bool:
    """Whether the kit has a set of this name; DataError if a folder here has it too, unless it is a run folder."""
    named = name in (*BUNDLED_SETS, *TORCHVISION_SETS, *TOY_SETS)
    if named and Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise DataError(
            f"{name!r} is both a data set of the kit and a folder, {Path(name).resolve()}: write ./{name} for the "
            "folder; for the data set, rename the folder, or start the command elsewhere"
        )
    return named


def _inside_scikit_learn(name: str) -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(f"{name[5:]} are part of scikit-learn: pip install 'dispersive-kit[notebooks]'") from error
    return getattr(datasets, name)()


def _digits(split: str) -> ImageSet:
    bunch = _inside_scikit_learn("load_digits")
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]  # (1797, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    index = order[:DIGITS_HELD_OUT] if split == "test" else order[DIGITS_HELD_OUT:]
    labels = torch.from_numpy(bunch.target).long()[index]
    return ImageSet("digits", split, images[index], labels, DIGITS, "sklearn.datasets.load_digits")


def _photos(split: str) -> ImageSet:
    """Crops of scikit-learn's two photographs at half size, for trials; the test crops come from the right third."""
    rng, crops = np.random.default_rng(split == "test"), []
    each = 128 if split == "test" else 512
    for photo in _inside_scikit_learn("load_sample_images").images:
        left, right = np.split(photo[::2, ::2], [213], axis=1)  # of (213, 320, 3)
        part = right if split == "test" else left
        tops, lefts = (rng.integers(0, side - 32, each) for side in part.shape[:2])
        crops += [part[a : a + 32, b : b + 32] for a, b in zip(tops, lefts, strict=True)]
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    labels = torch.arange(2).repeat_interleave(each)
    return ImageSet("photos", split, images, labels, ("temple", "flower"), "sklearn.datasets.load_sample_images")


BUNDLED_SETS: dict[str, Callable[[str], ImageSet]] = {"digits": _digits, "photos": _photos}


def _packed(name: str, split: str, file: Path) -> ImageSet:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            keep = arrays["split"] == (split == "test")
            images = torch.from_numpy(arrays["images"][keep]).permute(0, 3, 1, 2).contiguous()
            labels = torch.from_numpy(arrays["labels"][keep]).long()
            classes = tuple(str(c) for c in arrays["classes"])
    except Exception as error:  # numpy may raise almost anything for a damaged file; the message shows it
        raise DataError(
            f"{file} cannot be read ({error}); it must hold images (N, H, W, C), labels, split and classes. "
            "Replace it, or delete it to use torchvision's own files"
        ) from error
    return ImageSet(name, split, images, labels, classes, str(file))


def _torchvision(name: str, split: str, folder: Path, download: bool) -> ImageSet:
    from torchvision import datasets

    try:  # torchvision checks the md5 of what it unpickles, and downloads only what is missing
        found = getattr(datasets, name.upper())(folder, train=split == "train", download=download)
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise DataError(
            f"{name} is not in {folder}, or damaged there: {error}. Put there either {TORCHVISION_SETS[name]}, or "
            f"{name}.npz with arrays images (N, H, W, C) uint8, labels, split (0 train, 1 test) and classes; or name "
            "another folder with the setting data_dir or the variable DISPERSIVE_KIT_DATA"
        ) from error
    images = torch.as_tensor(found.data)  # (N, H, W), or (N, H, W, C)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    classes = DIGITS if name == "mnist" else tuple(found.classes)
    return ImageSet(name, split, images, torch.as_tensor(found.targets).long(), classes, f"torchvision in {folder}")


def _image_folder(folder: Path, split: str, size: int) -> ImageSet:
    parts = {path.name.lower(): path for path in list_folder(folder) if path.is_dir()}
    held_out = next((parts[name] for name in HELD_OUT_PARTS if name in parts), None)
    train = parts.get("train") if held_out else None
    listed = list_images(train or folder)
    if train and held_out and split == "test":
        classes, listed = listed.classes, list_images(held_out)
        if unknown := sorted(set(listed.classes) - set(classes)):
            raise DataError(f"{held_out} has a class {unknown[0]!r}, and {train} has not: remove it, or add it there")
        listed = replace(listed, classes=classes)
    files = [file for i, file in enumerate(listed.files) if train or (i % 10 == 9) == (split == "test")]
    if not files:
        raise DataError(f"{folder} holds {len(listed.files)} images: too few to hold out a tenth; add train/ and test/")
    images = []
    for read in (read_image(listed.root, file, size) for file in files):
        if read.pixels is None:
            raise DataError(f"{listed.root / read.file} is not a readable image ({read.fault}); repair or remove it")
        images.append(read.pixels)
    labels, how = torch.tensor([listed.label(file) for file in files]), f"ADM centre crop to {size}"
    return ImageSet(folder.name, split, torch.stack(images), labels, listed.classes, str(listed.root), how)
