"""The statistics of a paired comparison of segmentation results.

All functions take one value per case (or per subject) and are deterministic: ``resamples`` is the number of bootstrap
samples, ``seed`` that of their choice. Scores are (cases, results), more is better; differences are the candidate's
scores less the reference's. Sources: Hesterberg 2015 (The American Statistician 69, 371-386) for bootstrap intervals
that are not too narrow, Hall 1988 (Annals of Statistics 16, 927-953) for the bootstrap t, Holm 1979, Wilcoxon 1945,
Kerby 2014 for the rank-biserial correlation.
``benchmarks/statistics_checks.py`` measures coverage and false-positive rates of every procedure here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

RESAMPLES = 9999  # 1 / (RESAMPLES + 1) is the smallest p-value of a resampling test
MIN_CASES = 3  # fewer say nothing about spread
_DECIMALS = 12  # scores are ratios of counts: smaller differences are rounding
_BATCH = 2_000_000  # numbers held at a time

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Bounds of a confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class NonInferiority:
    """Outcome of a non-inferiority test."""

    p: float  # one-sided, of "the mean difference is -margin or less"
    lower: float  # bound of the mean difference at the test's level: above -margin exactly where p <= level


def as_values(values: ArrayLike) -> Floats:
    """A vector of scores or differences, free of rounding noise.

    Raises:
        ValueError: not one axis, or a value that is not finite.
    """
    array = np.asarray(values, dtype=np.float64).round(_DECIMALS)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError("one finite value per case is needed")
    return array


def mean_interval(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Bootstrap interval of the mean: percentiles, widened as the t interval is for few cases (Hesterberg 2015, 4.1).

    Without the widening the 95 % interval of 10 cases covers the true mean in 90 % of samples. The BCa interval was
    tried and not taken: it covers less where a few cases fail, which is how segmentations fail.

    None for fewer than ``MIN_CASES`` values.
    """
    values = as_values(values)
    n = len(values)
    if n < MIN_CASES:
        return None
    if np.ptp(values) == 0:
        return Interval(float(values[0]), float(values[0]))
    tail = stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf((1 - confidence) / 2, n - 1))
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _BATCH // n),
        confidence_level=1 - 2 * tail,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(interval.low), float(interval.high))


def wilcoxon(differences: ArrayLike) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test, which leaves out cases that do not differ; 1 if none does."""
    values = as_values(differences)
    return float(stats.wilcoxon(values, zero_method="wilcox").pvalue) if values.any() else 1.0


def rank_biserial(differences: ArrayLike) -> float:
    """Matched-pairs rank-biserial correlation, the effect size of the signed-rank test: -1 (all lose) to 1 (all win).

    The share of the rank sum that speaks for a gain less the share that speaks for a loss; 0 where no case differs.
    """
    values = as_values(differences)
    values = values[values != 0]
    if not len(values):
        return 0.0
    ranks = stats.rankdata(np.abs(values))
    return float((ranks * np.sign(values)).sum() / ranks.sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for testing all of them (Holm 1979): each at most as small as in Bonferroni's correction.

    Adjusted values keep the order of the input and never pass 1.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for position, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def non_inferiority(
    differences: ArrayLike, margin: float, *, level: float = 0.05, resamples: int = RESAMPLES, seed: int = 0
) -> NonInferiority | None:
    """One-sided test of "the mean difference is -margin or less" against "it is more".

    Two tests, and the stricter one counts: Student's paired t, which holds its level where a few cases spread widely,
    and the bootstrap t, which holds it where losses are rare and large (skewed differences), where Student's t finds
    non-inferiority too often. Wilcoxon's test on shifted differences is not used: it is about the median, and
    overlooks rare failures altogether.

    ``margin``, positive, is the loss in the mean that is still accepted, ``level`` that of the test, for its lower
    bound. None for fewer than ``MIN_CASES`` values.
    """
    values = as_values(differences)
    n = len(values)
    if n < MIN_CASES:
        return None
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return NonInferiority(p=0.0 if mean > -margin else 1.0, lower=mean)
    error = float(values.std(ddof=1)) / np.sqrt(n)
    t = (mean + margin) / error
    resampled = np.sort(_bootstrap_t(values, resamples, seed))[::-1]
    student = float(stats.t.sf(t, n - 1)), mean - float(stats.t.isf(level, n - 1)) * error
    # p <= level exactly where t exceeds this many of the resampled values, which makes the bound.
    exceeded = max(int(np.floor(level * (resamples + 1))) - 1, 0)
    bootstrap = (1 + int((resampled >= t).sum())) / (resamples + 1), mean - float(resampled[exceeded]) * error
    return NonInferiority(p=max(student[0], bootstrap[0]), lower=float(min(student[1], bootstrap[1])))


def _bootstrap_t(values: Floats, resamples: int, seed: int) -> Floats:
    """Studentised means of bootstrap samples; a sample of equal values counts as infinitely far from the mean."""
    parts = []
    for samples in _bootstrap(values, resamples, seed):  # (samples, cases)
        distance = samples.mean(axis=1) - values.mean()
        error = samples.std(axis=1, ddof=1) / np.sqrt(len(values))
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append(np.nan_to_num(distance / error, nan=0.0, posinf=np.inf, neginf=-np.inf))
    return np.concatenate(parts)


def _bootstrap(values: Floats, resamples: int, seed: int) -> Iterator[Floats]:
    """Bootstrap samples of the first axis of ``values``, (samples, *values.shape), a batch at a time."""
    rng = np.random.default_rng(seed)
    n, batch = len(values), max(1, _BATCH // values.size)
    for start in range(0, resamples, batch):
        yield values[rng.integers(0, n, (min(batch, resamples - start), n))]


def ranks(scores: ArrayLike) -> Floats:
    """Rank (cases, results) of each result in each case, 1 for the best; equal scores share the mean of their ranks."""
    rounded = np.asarray(scores, dtype=np.float64).round(_DECIMALS)
    return np.asarray(stats.rankdata(-rounded, axis=1), dtype=np.float64)


def friedman(scores: ArrayLike) -> float | None:
    """p-value of Friedman's test that all results rank equally; None for fewer than three results or cases."""
    rounded = np.asarray(scores, dtype=np.float64).round(_DECIMALS)
    if rounded.shape[1] < 3 or rounded.shape[0] < MIN_CASES:
        return None
    if (np.ptp(rounded, axis=1) == 0).all():
        return 1.0
    return float(stats.friedmanchisquare(*rounded.T).pvalue)


def first_place(scores: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> list[float]:
    """How stable the winner is: the share of bootstrap samples of the cases in which each result has the best mean.

    Results with the same best mean share the sample.
    """
    scores = np.asarray(scores, dtype=np.float64)
    wins = np.zeros(scores.shape[1])
    for samples in _bootstrap(scores, resamples, seed):
        means = samples.mean(axis=1).round(_DECIMALS)  # (samples, cases, results) -> (samples, results)
        best = means == means.max(axis=1, keepdims=True)
        wins += (best / best.sum(axis=1, keepdims=True)).sum(axis=0)
    return [float(share) for share in wins / resamples]
