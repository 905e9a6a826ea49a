"""The statistics: against brute force, hand-computed cases, scipy, and simulated nulls."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from nnunetv2_lightnets.comparison import statistics
from nnunetv2_lightnets.comparison.statistics import (
    first_place,
    friedman,
    holm,
    mean_interval,
    non_inferiority,
    rank_biserial,
    ranks,
    wilcoxon,
)

RESAMPLES = 499  # enough for properties; simulations say what they take
# Scores of a paired comparison, in steps that leave ties and zeros in.
# Not 10 to 13 cases: there scipy enumerates all signs where values are tied, which takes its time.
sizes = st.integers(3, 9) | st.integers(14, 25)
scores = arrays(np.float64, sizes, elements=st.integers(0, 1000).map(lambda i: i / 1000))
pairs = sizes.flatmap(
    lambda n: st.tuples(
        *(arrays(np.float64, n, elements=st.integers(0, 1000).map(lambda i: i / 1000)) for _ in range(2))
    )
)


# ------------------------------------------------------------------------------------------------------ known values


def test_wilcoxon_is_the_exact_test_by_enumeration():
    d = np.array([0.031, -0.012, 0.044, 0.008, 0.027, -0.003, 0.019, 0.051])
    rank = np.argsort(np.argsort(np.abs(d))) + 1
    observed = rank[d > 0].sum()
    sums = np.array(
        [sum(r for r, s in zip(rank, signs, strict=True) if s) for signs in itertools.product((0, 1), repeat=8)]
    )
    p = 2 * min((sums >= observed).mean(), (sums <= observed).mean())
    assert wilcoxon(d) == pytest.approx(p)
    # Cases without a difference are left out.
    assert wilcoxon([*d, 0.0, 0.0]) == pytest.approx(p, rel=0.2)
    assert rank_biserial([*d, 0.0, 0.0]) == rank_biserial(d)


def test_rank_biserial_by_hand():
    # |d| ranks 1, 2, 3, 4; a loss at rank 3: (1 + 2 + 4 - 3) / 10.
    assert rank_biserial([0.1, 0.2, -0.3, 0.4]) == pytest.approx(0.4)
    # Ties share: ranks 1.5, 1.5, 3; the loss is one of the tied ones.
    assert rank_biserial([0.1, -0.1, 0.3]) == pytest.approx(0.5)
    assert rank_biserial([0.1, 0.2]) == 1
    assert rank_biserial([-0.1, -0.2]) == -1
    assert rank_biserial([0.0, 0.0]) == 0


def test_holm_by_hand():
    # Smallest times 4, next times 3, ...; never smaller than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_interval_is_the_widened_percentile_interval():
    values = np.random.default_rng(3).beta(8, 2, 12)
    low, high = _percentiles(values, 0.95)
    found = mean_interval(values)
    # Widened by the t distribution: for 12 cases by about 17 % (2.20 / 1.96 * sqrt(12 / 11)).
    assert found.high - found.low == pytest.approx(1.17 * (high - low), rel=0.05)
    assert found.low < values.mean() < found.high
    # For many cases there is nothing to widen, and it is the t interval.
    values = np.random.default_rng(4).normal(0.8, 0.1, 800)
    found = mean_interval(values)
    expected = stats.t.interval(0.95, 799, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, abs=4e-4)


def _percentiles(values, confidence):
    rng = np.random.default_rng(0)
    means = rng.choice(values, (20000, len(values))).mean(axis=1)
    return np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])


def test_too_few_cases_have_no_interval_and_no_test():
    assert mean_interval([0.8, 0.9]) is None
    assert non_inferiority([0.0, 0.01], 0.01) is None
    assert mean_interval([0.8, 0.8, 0.8]) == statistics.Interval(0.8, 0.8)


def test_non_inferiority_is_the_stricter_of_students_and_the_bootstrap_t():
    rng = np.random.default_rng(1)
    symmetric = rng.normal(-0.004, 0.02, 60)
    found = non_inferiority(symmetric, 0.01)
    student = stats.ttest_1samp(symmetric, -0.01, alternative="greater")
    assert found.p == pytest.approx(student.pvalue, abs=0.006)
    assert found.p >= student.pvalue
    assert found.lower == pytest.approx(student.confidence_interval(0.95).low, abs=3e-4)
    # Rare large losses: Student's t finds non-inferiority, the bootstrap t does not.
    skewed = np.full(60, 0.004) + rng.normal(0, 0.002, 60)
    skewed[:3] = [-0.1, -0.12, -0.14]
    student = stats.ttest_1samp(skewed, -0.01, alternative="greater")
    assert student.pvalue < 0.05 < non_inferiority(skewed, 0.01).p


def test_non_inferiority_where_all_differences_are_equal():
    assert non_inferiority([0.0] * 5, 0.01).p == 0
    assert non_inferiority([-0.02] * 5, 0.01).p == 1
    assert non_inferiority([-0.01] * 5, 0.01).p == 1  # at the margin is not within it


def test_ranks_and_friedman():
    table = np.array([[0.9, 0.8, 0.7], [0.5, 0.6, 0.5], [0.3, 0.3, 0.3]])
    assert ranks(table).tolist() == [[1, 2, 3], [2.5, 1, 2.5], [2, 2, 2]]
    # (a + b) - b is not a exactly; a rank must not hang on that.
    assert ranks([[0.1 + 0.2, 0.3]]).tolist() == [[1.5, 1.5]]
    values = np.random.default_rng(0).random((20, 4))
    assert friedman(values) == pytest.approx(stats.friedmanchisquare(*values.T).pvalue)
    assert friedman(values[:, :2]) is None
    assert friedman(np.full((5, 3), 0.5)) == 1


def test_first_place():
    clear = np.array([[0.9, 0.5], [0.8, 0.6], [0.95, 0.7]])
    assert first_place(clear) == [1, 0]
    assert first_place(np.full((4, 2), 0.5)) == [0.5, 0.5]
    # Two cases, one each, one larger: AA and BB are sure, AB and BA go to the larger one.
    assert first_place([[0.9, 0.5], [0.5, 0.7]]) == pytest.approx([0.75, 0.25], abs=0.02)


def test_only_finite_vectors():
    with pytest.raises(ValueError, match="finite"):
        wilcoxon([0.1, np.nan])
    with pytest.raises(ValueError, match="one"):
        mean_interval([[0.1, 0.2]])


# --------------------------------------------------------------------------------------------------------- properties


@settings(max_examples=25, deadline=None)
@given(pairs)
def test_swapping_sides_flips_signs(pair):
    a, b = pair
    assert wilcoxon(a - b) == pytest.approx(wilcoxon(b - a), abs=1e-12)
    assert rank_biserial(a - b) == pytest.approx(-rank_biserial(b - a))
    one = mean_interval(a - b, resamples=RESAMPLES)
    other = mean_interval(b - a, resamples=RESAMPLES)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(pairs, st.integers(1, 9))
def test_adding_a_constant_to_both_changes_nothing(pair, tenths):
    a, b = pair
    before, after = a - b, (a + tenths / 10) - (b + tenths / 10)
    assert wilcoxon(after) == pytest.approx(wilcoxon(before), abs=1e-12)
    assert rank_biserial(after) == rank_biserial(before)
    assert (ranks(np.c_[a, b]) == ranks(np.c_[a, b] + tenths / 10)).all()
    one, other = (non_inferiority(d, 0.01, resamples=RESAMPLES) for d in (before, after))
    assert one.p == pytest.approx(other.p, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(scores, st.integers(-9, 9))
def test_a_shift_of_all_scores_shifts_the_interval(values, tenths):
    before = mean_interval(values, resamples=RESAMPLES)
    after = mean_interval(values + tenths / 10, resamples=RESAMPLES)
    assert (after.low, after.high) == pytest.approx((before.low + tenths / 10, before.high + tenths / 10), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(pairs, st.sampled_from([0.005, 0.01, 0.1]))
def test_the_bound_and_the_p_value_say_the_same(pair, margin):
    test = non_inferiority(pair[0] - pair[1], margin, resamples=RESAMPLES)
    if abs(test.lower + margin) > 1e-9:
        assert (test.p <= 0.05) == (test.lower > -margin)


@settings(max_examples=20, deadline=None)
@given(scores)
def test_equal_inputs_differ_in_nothing_and_warn_of_nothing(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        d = values - values
        assert wilcoxon(d) == 1
        assert rank_biserial(d) == 0
        assert mean_interval(d) == statistics.Interval(0, 0)
        assert non_inferiority(d, 0.01).lower == 0
        assert friedman(np.c_[values, values, values]) == 1
        assert first_place(np.c_[values, values], resamples=RESAMPLES) == [0.5, 0.5]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1, len(p_values) * p) + 1e-12
    assert [adjusted[i] for i in np.argsort(p_values, kind="stable")] == sorted(adjusted)


def test_results_depend_on_the_seed_alone():
    values = np.random.default_rng(0).random(30)
    assert mean_interval(values, seed=5) == mean_interval(values, seed=5)
    assert mean_interval(values, seed=5) != mean_interval(values, seed=6)
    assert non_inferiority(values - 0.5, 0.01, seed=5) == non_inferiority(values - 0.5, 0.01, seed=5)


# ----------------------------------------------------------------------------------------------------- simulated nulls


def test_wilcoxon_finds_no_difference_where_there_is_none():
    """Two networks of one quality, Dice-like scores, 30 cases: 5 ± 1 % false positives over 1,000 draws."""
    rng = np.random.default_rng(0)
    difficulty = rng.beta(8, 2, (1000, 30))
    a, b = (np.clip(difficulty + rng.normal(0, 0.03, (1000, 30)), 0, 1) for _ in range(2))
    found = [wilcoxon(d) <= 0.05 for d in a - b]
    assert np.mean(found) == pytest.approx(0.05, abs=0.01)


def test_holm_keeps_the_error_of_a_family():
    """Four networks that all equal the reference: some difference is claimed in 5 ± 1 % of comparisons at most."""
    d = np.random.default_rng(1).normal(0, 0.03, (3000, 4, 25))
    p_values = stats.wilcoxon(d, axis=2).pvalue
    assert [wilcoxon(row) for row in d[0]] == pytest.approx(p_values[0])
    assert 0.03 <= np.mean([min(holm(family)) <= 0.05 for family in p_values]) <= 0.06
    assert np.mean((p_values <= 0.05).any(axis=1)) > 0.15  # what it would be without correction


def test_the_interval_covers_the_true_mean():
    """95 ± 1.5 % for normal differences of 20 cases; plain percentiles cover less."""
    rng, n = np.random.default_rng(20), 20
    covered = []
    for _ in range(1000):
        interval = mean_interval(rng.normal(0.02, 0.05, n), resamples=1999)
        covered.append(interval.low <= 0.02 <= interval.high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(("name", "n"), [("normal", 30), ("skewed", 100)])
def test_non_inferiority_at_the_margin_is_claimed_in_five_percent(name, n):
    """The true loss is the margin: at most 5 ± 1 % of samples may pass, also where losses are rare and large."""
    rng = np.random.default_rng(3)
    passed, student = [], []
    for _ in range(1000):
        noise = rng.normal(0, 0.03, n) if name == "normal" else 0.03 * (1 - rng.exponential(1, n))
        passed.append(non_inferiority(noise - 0.01, 0.01, resamples=499).p <= 0.05)
        student.append(stats.ttest_1samp(noise, 0, alternative="greater").pvalue <= 0.05)
    assert 0.02 <= np.mean(passed) <= 0.06
    if name == "skewed":
        assert np.mean(student) > 0.06  # why Student's t is not enough
