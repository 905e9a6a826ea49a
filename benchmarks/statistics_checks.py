"""What the statistics of ``nnUNetv2_lightnets compare`` do on data whose truth is known.

Draws paired differences of Dice from distributions with a known mean, and records for each sample size: how often the
95 % interval covers the mean (with BCa's and plain percentiles beside it), how often Wilcoxon's test finds a difference
where there is none, and how often non-inferiority is claimed where the true loss is the margin (with Student's t and
Wilcoxon's shifted test beside it). Takes a few minutes; writes ``results/statistics_checks.csv``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from recording import RESULTS, Record, Tables, argument_parser, link, read_rows, table
from scipy import stats
from tqdm import tqdm

from nnunetv2_lightnets.comparison.statistics import mean_interval, non_inferiority, wilcoxon

RATES = RESULTS / "statistics_checks.csv"
PAGE = "docs/compare.md"
MARGIN = 0.01
SIZES = (10, 20, 50, 100, 200)
RESAMPLES = 999


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(0, 0.03, n)


def heavy_tails(rng: np.random.Generator, n: int) -> np.ndarray:
    """Student's t with 3 degrees of freedom."""
    return 0.02 * rng.standard_t(3, n)


def skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    """Small gains, exponential losses."""
    return 0.03 * (1 - rng.exponential(1, n))


def rare_failures(rng: np.random.Generator, n: int) -> np.ndarray:
    """In 5 % of cases the network fails and loses 24 Dice points on average; mean 0."""
    fails = rng.random(n) < 0.05
    return rng.normal(0.012, 0.01, n) - fails * rng.beta(2, 3, n) * 0.6


DISTRIBUTIONS: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], bool]] = {
    "normal": (normal, True),
    "heavy tails": (heavy_tails, True),
    "skewed losses": (skewed, False),
    "rare failures": (rare_failures, False),
}


def main() -> None:
    """Draw and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("-o", type=Path, default=RATES)
    args = parser.parse_args()
    record = Record(args.o, "differences", "cases")
    for name in tqdm(DISTRIBUTIONS, desc="distributions"):
        for n in tqdm(SIZES, desc=name, leave=False):
            record.put(check(name, n, args.draws))


def tables() -> Tables:
    """Every distribution at 20 cases, and the one with rare failures at all sizes from there on."""
    rows = [
        {column: value for column, value in row.items() if column != "draws"}
        for row in read_rows(RATES)
        if int(row["cases"]) == 20 or (row["differences"] == "rare failures" and int(row["cases"]) > 20)
    ]
    return {PAGE: [*table(rows), "", link(PAGE, RATES)]}


def check(name: str, n: int, draws: int) -> dict[str, object]:
    """Rates in percent for one distribution of differences and one number of cases."""
    draw, symmetric = DISTRIBUTIONS[name]
    rng = np.random.default_rng(n)
    covered, bca, percentile, different, claimed, student, shifted = ([] for _ in range(7))
    for _ in range(draws):
        d = draw(rng, n)  # true mean 0
        interval = mean_interval(d, resamples=RESAMPLES)
        covered.append(interval.low <= 0 <= interval.high)
        bca.append(bootstrap_covers(d, "BCa"))
        percentile.append(bootstrap_covers(d, "percentile"))
        different.append(wilcoxon(d) <= 0.05)
        claimed.append(non_inferiority(d - MARGIN, MARGIN, resamples=RESAMPLES).p <= 0.05)
        student.append(stats.ttest_1samp(d, 0, alternative="greater").pvalue <= 0.05)
        shifted.append(stats.wilcoxon(d, alternative="greater").pvalue <= 0.05)
    row: dict[str, object] = {"differences": name, "cases": n, "draws": draws}
    rates = {
        "interval covers": covered,
        "BCa covers": bca,
        "percentiles cover": percentile,
        "Wilcoxon false positives": different if symmetric else None,
        "non-inferiority claimed at the margin": claimed,
        "by Student's t alone": student,
        "by Wilcoxon shifted": shifted,
    }
    return row | {what: "" if hits is None else f"{100 * np.mean(hits):.1f}" for what, hits in rates.items()}


def bootstrap_covers(d: np.ndarray, method: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = stats.bootstrap((d,), np.mean, n_resamples=RESAMPLES, method=method, rng=np.random.default_rng(0))
    return bool(found.confidence_interval.low <= 0 <= found.confidence_interval.high)


if __name__ == "__main__":
    main()
