"""The statistics of a study, against closed forms, enumeration and scipy."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from dispersive_kit.study.verdict import (
    CRASH,
    holm,
    judge_pairs,
    log_ratios,
    sign_flip_p,
    smallest_p,
    t_interval,
    tost_p,
)

rng = np.random.default_rng(0)


@pytest.mark.parametrize("n", [2, 5, 6, 9])
def test_the_best_p_of_n_pairs_is_two_over_two_to_the_n(n):
    assert sign_flip_p(np.linspace(1, 2, n)) == pytest.approx(2 / 2**n, abs=1e-12) == smallest_p(n)


def test_six_pairs_can_reach_the_level_and_five_cannot():
    assert sign_flip_p(np.arange(1.0, 7)) == pytest.approx(0.03125) and sign_flip_p(np.arange(1.0, 6)) > 0.05


@pytest.mark.parametrize("n", [4, 7])
def test_the_sign_flip_p_is_the_share_of_all_signs_at_least_as_extreme(n):
    x = rng.normal(0.4, 1, n)
    means = [abs(np.mean(x * signs)) for signs in itertools.product((1, -1), repeat=n)]
    assert sign_flip_p(x) == pytest.approx(np.mean(np.array(means) >= abs(x.mean()) - 1e-12))


def test_holm_by_hand():
    # sorted .01, .02, .03, .5 times 4, 3, 2, 1 is .04, .06, .06, .5, each at least the one before
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_the_interval_is_students():
    x = rng.normal(0.2, 0.3, 6)
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert t_interval(x) == pytest.approx((expected.low, expected.high))


def test_equivalence_is_the_ninety_percent_interval_within_the_margin():
    x = rng.normal(0.01, 0.05, 8)
    low, high = stats.ttest_1samp(x, 0).confidence_interval(0.90)
    edge = max(abs(low), abs(high))  # at this margin exactly the larger one-sided p is 0.05
    assert tost_p(x, edge) == pytest.approx(0.05)
    assert tost_p(x, 1.1 * edge) < 0.05 < tost_p(x, 0.9 * edge)
    same = np.full(6, 0.1)
    assert (tost_p(same, 0.2), tost_p(same, 0.05)) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("shift", "spread", "better", "word"),
    [(1.0, 0.1, -1, "worse"), (-1.0, 0.1, -1, "better"), (1.0, 0.1, 1, "better"), (0.0, 0.01, -1, "equivalent"),
     (0.05, 0.01, -1, "equivalent"), (0.0, 0.5, -1, "inconclusive")],
)  # fmt: skip
def test_one_word_for_each_situation(shift, spread, better, word):
    x = shift + spread * np.array([-1.0, 1.2, -0.8, 0.9, 1.1, -1.4])
    assert judge_pairs(x, better=better, margin=0.1).word == word


def test_a_difference_that_holm_does_not_let_stand_is_inconclusive():
    x = np.array([1.0, 1.1, 0.9, 1.2, 0.8, 1.3])
    assert judge_pairs(x, better=-1, margin=0.1, p_adjusted=0.06).word == "inconclusive"


def test_a_crash_counts_against_its_own_side_whichever_way_is_better():
    lower = log_ratios([None, 2.0, None], [1.0, None, None], better=-1)
    assert lower == pytest.approx([CRASH, -CRASH, 0.0])
    assert log_ratios([None], [0.9], better=1) == pytest.approx([-CRASH])
    assert log_ratios([3.0], [1.5], better=-1) == pytest.approx([math.log(2)])


def test_pairs_of_which_both_runs_crashed_are_no_evidence_of_equality():
    nothing = log_ratios([None] * 6, [None] * 6, -1)
    assert judge_pairs(nothing, better=-1, margin=0.05, empty=6).word == "inconclusive"
    same = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.001])
    assert judge_pairs(same, better=-1, margin=0.05).word == "equivalent"
    assert judge_pairs(same, better=-1, margin=0.05, empty=5).word == "inconclusive"
