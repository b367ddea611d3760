"""Mean and covariance of features, streamed: batches of any size, merged in float64 in any grouping."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dispersive_kit.errors import ConfigError, DataError
from dispersive_kit.evaluation.processes import shared_out

if TYPE_CHECKING:
    from dispersive_kit.evaluation.features import FeatureExtractor

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Count n, mean (D,) and scatter (D, D), the sum of (x - mean)(x - mean)^T, of the rows seen so far."""

    n: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, features: NDArray) -> "Moments":
        x = np.asarray(features, dtype=np.float64)  # (N, D)
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: "Moments") -> "Moments":
        """Both sets together (Chan, Golub & LeVeque 1979): no cancellation, however large the mean is."""
        n, shift = self.n + other.n, other.mean - self.mean
        between = np.outer(shift, shift) * (self.n * other.n / n)
        return Moments(n, self.mean + shift * (other.n / n), self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Array:
        if self.n < 2:
            raise ConfigError("a covariance needs at least two images")
        return self.scatter / (self.n - 1)


def merge(parts: Iterable[Moments]) -> Moments:
    """All parts together, in the order given. Raises ConfigError: there are none."""
    total = None
    for part in parts:
        total = part if total is None else total + part
    if total is None:
        raise ConfigError("there are no features to take moments of")
    return total


def stream_moments(extractor: "FeatureExtractor", images: Tensor, *, batch_size: int = 256) -> Moments:
    """Moments of the features of uint8 images (N, C, H, W), one batch at a time; processes take batches in turn."""
    return merge(shared_out(lambda rows: Moments.of(extractor(images[rows])), len(images), batch_size))


def frechet_from_statistics(mean_x: Array, covariance_x: Array, mean_y: Array, covariance_y: Array) -> float:
    """Squared Frechet distance of two Gaussians given by mean (D,) and covariance (D, D).

    tr (S_x S_y)^(1/2) is the sum of the roots of the eigenvalues of the symmetric S_x^(1/2) S_y S_x^(1/2).

    Raises:
        ConfigError: the shapes do not belong together.
    """
    if {a.shape for a in (mean_x, mean_y)} != {(len(mean_x),)} or {a.shape for a in (covariance_x, covariance_y)} != {
        (len(mean_x),) * 2
    }:
        raise ConfigError(
            f"means {mean_x.shape} and {mean_y.shape}, covariances {covariance_x.shape} and {covariance_y.shape} "
            "do not belong together; use one extractor for both"
        )
    eigenvalues, vectors = np.linalg.eigh(covariance_x)
    root = vectors * np.sqrt(eigenvalues.clip(min=0))  # R R^T = S_x, so R^T S_y R has the eigenvalues wanted
    cross = np.sqrt(np.linalg.eigvalsh(root.T @ covariance_y @ root).clip(min=0)).sum()
    shift = mean_x - mean_y
    return float(shift @ shift + np.trace(covariance_x) + np.trace(covariance_y) - 2 * cross)


def save_statistics(file: Path, moments: Moments, extractor: "FeatureExtractor | None" = None) -> None:
    """Write `mu` and `sigma`, the form of the reference files of ADM's evaluation suite, and of which extractor."""
    arrays: dict[str, Any] = {"mu": moments.mean, "sigma": moments.covariance}
    if extractor is not None:
        arrays["extractor"] = np.array(extractor.weights_sha256)
    np.savez(file, **arrays)


def stated_extractor(file: Path) -> str | None:
    """sha256 of the weights of the extractor that a file of `save_statistics` is of; ADM's files do not say."""
    with np.load(file, allow_pickle=False) as arrays:
        return str(arrays["extractor"]) if "extractor" in arrays.files else None


def load_statistics(file: Path, weights_sha256: str | None = None) -> tuple[Array, Array]:
    """Mean (D,) and covariance (D, D) of a reference file, ADM's own or one of `save_statistics`.

    Raises:
        DataError: no such file, or no finite mu and sigma in it. ConfigError: it says that it is of an extractor with
            other weights.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            mu, sigma = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
    except (OSError, KeyError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise DataError(f"{file} holds no reference statistics (arrays mu and sigma): {error}") from error
    if mu.ndim != 1 or sigma.shape != (len(mu),) * 2:
        raise DataError(f"{file}: mu {mu.shape} and sigma {sigma.shape} do not belong together")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DataError(f"{file}: mu or sigma holds NaN or infinity")
    if (stated := stated_extractor(file)) and weights_sha256 and stated != weights_sha256:
        raise ConfigError(
            f"{file} is of an extractor with weights {stated[:12]}, and these features are of {weights_sha256[:12]}: "
            "a distance between the two says nothing"
        )
    return mu, sigma
