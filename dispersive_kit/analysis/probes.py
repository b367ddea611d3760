"""Linear and nearest-neighbour probes of features, chosen on validation images and tested once.

Features are (draws, N, D): each image with several draws of noise. A probe is fitted on all draws, ridge on features
standardised with the training statistics. Its accuracy is the mean over draws and images, and its interval that of N
images. For McNemar's test an image counts as right if most of its draws are classified correctly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dispersive_kit.analysis.features import LEVELS, Encoder, extract, pooling
from dispersive_kit.analysis.geometry import finite
from dispersive_kit.data import ImageSet
from dispersive_kit.diffusion.paths import LINEAR, Path
from dispersive_kit.errors import ConfigError, DataError
from dispersive_kit.evaluation.distances import wilson

LAMBDAS = tuple(10.0**k for k in range(4, -5, -1))  # of ridge, in units of a feature's variance; strongest first
Predict = Callable[[Tensor], Tensor]  # rows (n, D) -> labels (settings, n), one row a setting
K = 5  # neighbours of the knn probe


@dataclass(frozen=True)
class Split:
    """Features (draws, N, D) and labels (N,) of one part of the data.

    Raises DataError: other shapes; values that are not finite.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if self.x.ndim != 3 or self.x.shape[1] != len(self.y):
            raise DataError(f"features {tuple(self.x.shape)} of {len(self.y)} labels: give (draws, N, D) and (N,)")
        finite(self.x)

    @property
    def rows(self) -> Tensor:
        return self.x.flatten(0, 1).double()  # (draws N, D)

    @property
    def row_labels(self) -> Tensor:
        return self.y.repeat(len(self.x))


class Splits(NamedTuple):
    """Train, validation and test part of one kind of features."""

    train: Split
    validation: Split
    test: Split


def candidates(
    encode: Encoder, parts: Sequence[ImageSet], levels: Sequence[float] = LEVELS, *,
    pool: str = "tokens", draws: int = 1, path: Path = LINEAR,
) -> dict[tuple[int, int], Splits]:  # fmt: skip
    """(level, block) -> features of training, validation and test images, to choose among.

    Each part has different noise: with equal noise, a training image would be the nearest neighbour of a test image.
    pool: how tokens become rows, a name in `POOLS`; components are fitted to training images. path: the one that the
    network was trained on; it gives the time of each log-SNR.
    """
    pooled = pooling(pool, encode, parts[0].images, levels, path=path)
    features = [
        extract(encode, part.images, levels, pool=pooled, draws=draws, seed=i, path=path)
        for i, part in enumerate(parts)
    ]
    return {
        (level, block): Splits(*(Split(f[level][:, block], p.labels) for f, p in zip(features, parts, strict=True)))
        for level in range(len(levels))
        for block in range(features[0][0].shape[1])
    }


def standardise(train: Split) -> Callable[[Tensor], Tensor]:
    """Zero mean and unit variance by the training rows; a constant channel becomes zero."""
    mean, std = train.rows.mean(0), train.rows.std(0)
    return lambda x: (x.double() - mean) / torch.where(std > 1e-12, std, torch.inf)


def ridge(train: Split, lambdas: Sequence[float] = LAMBDAS) -> Predict:
    """Ridge regression on one-hot labels for all lambdas, from one eigendecomposition.

    W(lambda) = V (L + lambda n)^-1 V^T X^T Y with X^T X = V L V^T, X standardised, Y centred; with fewer rows than
    features the same from X X^T = U L U^T, as W(lambda) = X^T U (L + lambda n)^-1 U^T Y.
    """
    scaled = standardise(train)
    x, y = scaled(train.rows), F.one_hot(train.row_labels).double()
    few = len(x) < x.shape[1]
    values, v = torch.linalg.eigh(x @ x.T if few else x.T @ x)  # (m,), (m, m) with m = min(n, D)
    towards = v.T @ ((y - y.mean(0)) if few else x.T @ (y - y.mean(0)))  # (m, K)
    axes = x.T @ v if few else v  # (D, m)
    shrunk = torch.stack([towards / (values.clamp(min=0) + one * len(x))[:, None] for one in lambdas])
    return lambda rows: ((scaled(rows) @ axes) @ shrunk + y.mean(0)).argmax(-1)


def _knn(train: Split) -> Predict:
    """Vote of the K nearest training rows."""
    mean, hot = train.rows.mean(0), F.one_hot(train.row_labels)
    x = train.rows - mean  # otherwise cancellation in cdist's Gram matrix
    return lambda rows: hot[torch.cdist(rows - mean, x).topk(K, largest=False).indices].sum(1).argmax(-1)[None]


PROBES: dict[str, Callable[[Split], Predict]] = {"ridge": ridge, "knn": _knn}


@dataclass(frozen=True)
class Result:
    """Test accuracy with its 95 % interval, measured once, of the candidate that is best on validation images."""

    chosen: Any
    validation: float
    accuracy: float
    low: float
    high: float
    right: Tensor  # bool (N,): most draws of the image right

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}]"


def choose_and_test(kind: str, candidates: Mapping[Any, Splits]) -> tuple[Result, dict[Any, float]]:
    """Fit a probe on each candidate (block, level, ...), choose by validation accuracy, and test that one alone.

    If settings have equal validation accuracy, the first is taken, which has the strongest shrinkage. Also returns the
    validation accuracy of every candidate; maps are drawn from it.
    Raises ConfigError: no probe has this name.
    """
    if kind not in PROBES:
        raise ConfigError(f"unknown probe {kind!r}; there are: {', '.join(PROBES)}")
    predictors, accuracies = {}, {}
    for key, parts in candidates.items():
        predictors[key] = PROBES[kind](parts.train)
        accuracies[key] = _right(predictors[key], parts.validation).flatten(1).double().mean(1)  # (settings,)
    validation = {key: float(accuracy.max()) for key, accuracy in accuracies.items()}
    best = max(validation, key=lambda key: validation[key])
    right = _right(predictors[best], candidates[best].test)[int(accuracies[best].argmax())].double()  # (draws, N)
    low, high = wilson(float(right.mean()), right.shape[1])
    return Result(best, validation[best], float(right.mean()), low, high, right.mean(0) > 0.5), validation


def _right(predict: Predict, split: Split) -> Tensor:
    """Whether each draw of each image is classified correctly, bool (settings, draws, N)."""
    return (predict(split.rows) == split.row_labels).unflatten(1, split.x.shape[:2])


def mcnemar(first: Tensor, second: Tensor) -> float:
    """Exact two-sided p of McNemar's test for `Result.right` (N,) of two arms on the same images; 1 if they agree."""
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    both = only_first + only_second
    return float(binomtest(only_first, both).pvalue) if both else 1.0


def shuffled(splits: Splits) -> Splits:
    """A control of the probe: shuffled training and validation labels, so that test accuracy is at chance level."""
    generator = torch.Generator().manual_seed(0)
    train, validation = (Split(p.x, p.y[torch.randperm(len(p.y), generator=generator)]) for p in splits[:2])
    return Splits(train, validation, splits.test)
