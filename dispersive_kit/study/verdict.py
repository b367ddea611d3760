"""From paired runs to one word: exact sign-flip test, Holm, interval, equivalence within a margin.

Everything acts on log-ratios x_k = log(value of the arm / value of the reference), one for each seed: 0 is no
difference, log 2 is twice the value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
DIRECTION = {"frechet": -1, "held_out": -1, "probe": 1}  # the sign that a better arm's log-ratio has
CRASH = math.log(10)  # a run that crashed counts as ten times worse than its pair
INACTIVE = 1e-3  # median ratio of the gradients below which the regulariser did nothing


@dataclass(frozen=True)
class Verdict:
    """What n pairs say.

    mean: of the log-ratios, with the 95 % t-interval low to high. p: sign-flip, two-sided, exact; p_adjusted: by
    Holm among the secondaries, else p. p_equivalent: of the two one-sided t-tests against +-margin.
    """

    word: str
    n: int
    mean: float
    low: float
    high: float
    p: float
    p_adjusted: float
    p_equivalent: float
    margin: float


def smallest_p(n: int) -> float:
    """The least two-sided p that n pairs can reach in a sign-flip test: all signs one way, 2 / 2^n."""
    return 2.0 ** (1 - n)


def log_ratios(arm: Sequence[float | None], reference: Sequence[float | None], better: int) -> NDArray[np.float64]:
    """Paired log-ratios (n,); None is a crashed run, which counts as `CRASH` against its own side, and as 0 where both
    crashed: say so to `judge_pairs`.
    """

    def one(a: float | None, b: float | None) -> float:
        if a is not None and b is not None:
            return math.log(a / b)
        return -better * CRASH * ((a is None) - (b is None))

    return np.array([one(a, b) for a, b in zip(arm, reference, strict=True)])


def sign_flip_p(x: NDArray[np.float64]) -> float:
    """Exact two-sided p that the mean of x (n,) is 0, over all 2^n signs: no assumption but symmetry about 0."""
    from scipy.stats import permutation_test

    test = permutation_test((x,), _mean, permutation_type="samples", n_resamples=np.inf, vectorized=True, batch=2**14)
    return float(test.pvalue)


def _mean(x: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    return np.asarray(np.mean(x, axis=axis))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p of a family: max over the smaller ones of (m - rank) p, at most 1."""
    order, m, worst = np.argsort(p, kind="stable"), len(p), 0.0
    adjusted = [0.0] * m
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (m - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def t_interval(x: NDArray[np.float64], level: float = 1 - LEVEL) -> tuple[float, float]:
    """Student's interval of the mean of x (n,); if all are equal, that value twice."""
    from scipy.stats import sem, t

    half = float(t.ppf((1 + level) / 2, len(x) - 1) * sem(x))
    return float(x.mean()) - half, float(x.mean()) + half


def tost_p(x: NDArray[np.float64], margin: float) -> float:
    """Larger p of the two one-sided t-tests: is the mean of x (n,) above -margin, and below margin?"""
    from scipy.stats import ttest_1samp

    if np.ptp(x) == 0:  # no spread, no t
        return 0.0 if abs(x[0]) < margin else 1.0
    sides = ((-margin, "greater"), (margin, "less"))
    return max(float(ttest_1samp(x, bound, alternative=side).pvalue) for bound, side in sides)


def judge_pairs(
    x: NDArray[np.float64], *, better: int, margin: float, p_adjusted: float | None = None, empty: int = 0
) -> Verdict:
    """The verdict on paired log-ratios x (n,).

    "equivalent" where the 90 % interval lies within +-margin, also if a difference inside it is certain: the margin
    was fixed as what counts as none. Else "better" or "worse" where the adjusted p is below 0.05; else "inconclusive".

    Args:
        better: -1 if less of the measure is better, 1 if more is. p_adjusted: from `holm`; None: alone in its family.
        empty: pairs of which both runs crashed. Where there are any, nothing is "equivalent": they measured nothing.
    """
    p, mean = sign_flip_p(x), float(x.mean())
    adjusted = p if p_adjusted is None else p_adjusted
    equivalent = tost_p(x, margin)
    word = "inconclusive"
    if equivalent < LEVEL and not empty:
        word = "equivalent"
    elif adjusted < LEVEL:
        word = "better" if mean * better > 0 else "worse"
    return Verdict(word, len(x), mean, *t_interval(x), p, adjusted, equivalent, margin)
