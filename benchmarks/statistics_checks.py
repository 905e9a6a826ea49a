"""What the statistics of ``nnUNetv2_lightnets compare`` do on data whose truth is known.

Draws paired differences of Dice from distributions with a known mean, and records for each sample size: how often the
95 % interval covers the mean (with BCa's and plain percentiles beside it), how often Wilcoxon's test finds a difference
where there is none, and how often non-inferiority is claimed where the true loss is the margin (with Student's t and
Wilcoxon's shifted test beside it). Takes a few minutes; writes ``results/statistics_checks.csv`` and the table of
``docs/compare.md``.
"""

from __future__ import annotations

import argparse
import csv
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pages import DOCS, markdown, read_rows, write_table
from scipy import stats
from tqdm import tqdm

from nnunetv2_lightnets.comparison.statistics import mean_interval, non_inferiority, wilcoxon

RESULTS = Path(__file__).parent / "results" / "statistics_checks.csv"
PAGE = DOCS / "compare.md"
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("-o", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = [
        check(name, n, args.draws)
        for name in tqdm(DISTRIBUTIONS, desc="distributions")
        for n in tqdm(SIZES, desc=name, leave=False)
    ]
    with open(args.o, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if args.o == RESULTS:
        write_page(args.o)


def write_page(results: Path) -> None:
    """Put what is recorded on the page."""
    rows = read_rows(results)
    write_table(PAGE, Path(__file__).name, markdown([column for column in rows[0] if column != "draws"], rows))


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
