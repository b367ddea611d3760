"""Feature extractors: uint8 images (N, C, H, W) -> float32 features (N, D). Their names are in the numbers' names."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dispersive_kit.data import ImageSet, to_float
from dispersive_kit.data.files import file_sha256
from dispersive_kit.data.images import data_folder
from dispersive_kit.errors import CheckpointError, ConfigError, KitError
from dispersive_kit.evaluation.generate import Samples, draw_images, gathered, progress, shared_out
from dispersive_kit.models import efficientnet
from dispersive_kit.training.batches import DeviceSet
from dispersive_kit.training.regularizer import train_classifier

Extractors = Literal["auto", "classifier", "pixels-pca32", "effnet-lite0-pca64", "inception"]
INCEPTION = "inception-pool3"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """sha256 of the names and values of all tensors, in their order."""
    digest = hashlib.sha256()
    for name, tensor in state_dict.items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class FeatureExtractor:
    """A function from images to features, with all that a reader needs to repeat it.

    name: a part of the number's name, `FD[name, N=...]`. preprocess: in words, with the resize. note: e.g. the
    accuracy of a trained extractor. extract: images -> base features, on `device`; project: these -> features.
    """

    name: str
    version: str
    dim: int
    preprocess: str
    extract: Callable[[Tensor], Tensor]
    weights_sha256: str | None = None
    note: str = ""
    project: Callable[[Tensor], Tensor] | None = None
    device: torch.device | str = "cpu"

    def card(self) -> dict[str, Any]:
        """The description of the extractor for a record."""
        return {key: getattr(self, key) for key in ("name", "version", "dim", "weights_sha256", "preprocess", "note")}

    def __call__(self, images: Tensor | Samples) -> NDArray[np.float32]:
        """Features (N, dim) of uint8 images (N, C, H, W), in batches the processes share; `Samples` are drawn here.

        Raises ConfigError: the images are not uint8 (N, C, H, W). KitError: the processes have different extractors.
        """
        if len(set(gathered([(self.weights_sha256, self.note)]))) > 1:
            raise KitError(f"{self.name} differs between the processes; start them with the same settings and threads")

        @torch.no_grad()
        def features(rows: slice) -> NDArray[np.float32]:
            batch = images[rows]
            if batch.dtype != torch.uint8 or batch.ndim != 4:
                raise ConfigError(
                    f"{self.name} takes uint8 images (N, C, H, W), got {batch.dtype} {tuple(batch.shape)}; "
                    "convert with dispersive_kit.data.to_uint8"
                )
            base = self.extract(batch.to(self.device)).cpu()
            return (self.project(base) if self.project else base).float().numpy()

        return np.concatenate(shared_out(features, len(images), f"features by {self.name}"))


def make_extractor(
    name: str, train: ImageSet, held_out: ImageSet, *, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """The extractor that the command line calls `name`.

    name: "classifier", trained on `train` (a minute at 32 pixels, an hour at 256); "pixels-pca32" and
    "effnet-lite0-pca64", whose components are fitted to `train`; "inception", whose weights lie in `data_folder()`;
    "auto" is the classifier up to 32 pixels, and EfficientNet for larger images and for images of one class.
    Raises ConfigError: no extractor has this name. CheckpointError: its weights are missing, or not the known file.
    """
    makers: dict[str, Callable[[], FeatureExtractor]] = {
        "classifier": lambda: _small_classifier(train, held_out),
        "pixels-pca32": lambda: _pca(_pixels(train.images), train.images, 32),
        "effnet-lite0-pca64": lambda: _pca(_effnet_lite0(device), draw_images(train, 2000).images, 64),
        "inception": lambda: inception_pool3(device),
    }
    if name == "auto":
        name = "classifier" if train.images.shape[-1] <= 32 and len(train.classes) > 1 else "effnet-lite0-pca64"
    if name not in makers:
        raise ConfigError(f"unknown extractor {name!r}; there are: {', '.join(makers)}")
    return makers[name]()


def _pixels(images: Tensor) -> FeatureExtractor:
    dim = images[0].numel()
    return FeatureExtractor("pixels", "1", dim, "uint8 / 127.5 - 1, flattened", lambda x: to_float(x).flatten(1))


def _pca(base: FeatureExtractor, train_images: Tensor, k: int) -> FeatureExtractor:
    """The first k principal components of `base`, fitted on real training images only.

    Low-dimensional on purpose: the bias of a Frechet distance at N samples grows as k^2 / N.
    """
    if not 0 < k <= min(base.dim, len(train_images) - 1):
        raise ConfigError(f"k = {k} components of {base.dim} features of {len(train_images)} images is not possible")
    mean, axes = principal_axes(torch.from_numpy(base(train_images)))
    basis = axes[:, :k]
    basis = basis * basis.gather(0, basis.abs().argmax(0)[None]).sign()  # fix the signs, which are arbitrary
    digest = hashlib.sha256(train_images.contiguous().numpy().tobytes()).hexdigest()
    note = f"PCA fitted on {len(train_images)} training images (sha256 {digest}). {base.note}".strip()
    return replace(base, name=f"{base.name}/pca{k}", dim=k, note=note, project=lambda x: (x.double() - mean) @ basis)


def principal_axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and axes (D, ...) of rows (N, D), largest variance first, from the smaller Gram matrix."""
    mean = x.mean(0, dtype=torch.double)
    if len(x) > x.shape[1]:  # in parts, since the pixels of CIFAR-10 in double precision would be 1.2 GB
        parts = (part.double() - mean for part in x.split(4096))
        return mean, torch.linalg.eigh(sum(part.T @ part for part in parts))[1].flip(1)
    x = x.double() - mean
    return mean, F.normalize(x.T @ torch.linalg.eigh(x @ x.T)[1].flip(1), dim=0)


def _small_classifier(train: ImageSet, held_out: ImageSet) -> FeatureExtractor:
    """The 48 features of a classifier trained on `train` (seconds on a CPU), for images too small for ImageNet nets."""
    steps = progress(range(400), f"training {train.name}-classifier48")
    network = train_classifier(DeviceSet.of(train), len(train.classes), seed=0, widths=(24, 48, 48), steps=steps)

    def features(images: Tensor) -> Tensor:
        return network["body"](to_float(images)).mean((2, 3))

    labels = torch.cat([network["head"](features(part)).argmax(1) for part in held_out.images.split(512)])
    note = f"held-out accuracy {int((labels == held_out.labels).sum()) / len(held_out):.3f}"
    sha256 = weights_sha256(network.state_dict())
    return FeatureExtractor(f"{train.name}-classifier48", "1/seed0", 48, "uint8 / 127.5 - 1", features, sha256, note)


def _effnet_lite0(device: torch.device | str) -> FeatureExtractor:
    """The 1,280 pooled features of EfficientNet-Lite0 with its ImageNet weights, from the installed wheel."""
    network = efficientnet.efficientnet_lite0().to(device)
    preprocess = "bicubic to 224 x 224 with antialias, (x - 127) / 128, grey repeated"
    extract = _in_parts(lambda images: network.features(efficientnet.preprocess(images)), device)
    sha256 = efficientnet.WEIGHTS_SHA256
    return FeatureExtractor("effnet-lite0", "imagenet", efficientnet.DIM, preprocess, extract, sha256, device=device)


def _in_parts(network: Callable[[Tensor], Tensor], device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """`network`, applied to parts of a batch of 224 x 224 images, so small on a CPU that its caches are used well.

    EfficientNet-Lite0 on one core: 128 images take 7.4 s in parts of 16, with a third of the memory, 13.3 s at once.
    """
    size = 16 if torch.device(device).type == "cpu" else 256
    return lambda images: torch.cat([network(part) for part in images.split(size)])


def inception_pool3(device: torch.device | str) -> FeatureExtractor:
    """The 2,048 pool3 features of TensorFlow's Inception of 2015, through torch-fidelity; nothing is downloaded."""
    weights = data_folder() / INCEPTION_WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"no Inception weights at {weights}: put torch-fidelity's {INCEPTION_WEIGHTS} there")
    if (digest := file_sha256(weights)) != INCEPTION_SHA256:
        raise CheckpointError(
            f"{weights} is not {INCEPTION_WEIGHTS}: its sha256 is {digest[:16]}..., not {INCEPTION_SHA256[:16]}..."
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise CheckpointError("torch-fidelity is not installed: pip install 'dispersive-kit[eval]'") from error
    network = FeatureExtractorInceptionV3("inception", ["2048"], str(weights)).to(device)
    version = "2015-12-05, torch-fidelity"
    preprocess = "bilinear to 299 x 299 as TensorFlow 1 does, (x - 128) / 128, grey repeated"
    extract = _in_parts(lambda images: network(images.expand(-1, 3, -1, -1))[0], device)
    return FeatureExtractor(INCEPTION, version, 2048, preprocess, extract, INCEPTION_SHA256, device=device)
