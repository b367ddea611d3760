"""The score of a classifier's opinions: Inception Score's formula for any classifier."""

import numpy as np
from numpy.typing import NDArray

from dispersive_kit.evaluation.distances import Array, checked

IS_SPLITS = 10  # the published Inception Scores are means over ten parts


def classifier_score(logits: NDArray, halves: NDArray[np.bool_], *, splits: int = 1) -> tuple[float, Array]:
    """exp(E_x KL(p(y|x) | p(y))) of logits (N, K), and its value on halves (R, N) (Salimans et al., arXiv 1606.03498).

    1 if all images look alike to the classifier, K if it is sure of each and all classes are equally frequent.
    splits: mean over consecutive equal parts, as in the published Inception Scores.
    """
    x = checked(logits)
    log_p = x - np.logaddexp.reduce(x, axis=1, keepdims=True)
    p = np.exp(log_p)
    minus_entropy = (p * log_p).sum(1)  # (N,)
    ends = [i * len(x) // splits for i in range(splits + 1)]
    parts = np.zeros((splits, len(x)), dtype=bool)
    for part, start, end in zip(parts, ends, ends[1:], strict=False):
        part[start:end] = True
    value = _scores(minus_entropy, p, parts).mean()
    return float(value), _scores(minus_entropy, p, halves)


def _scores(minus_entropy: Array, p: Array, members: NDArray[np.bool_]) -> Array:
    n = members.sum(1)
    marginal = members @ p / n[:, None]  # (R, K)
    log_marginal = np.log(np.maximum(marginal, np.finfo(float).tiny))
    return np.exp(members @ minus_entropy / n - (marginal * log_marginal).sum(1))
