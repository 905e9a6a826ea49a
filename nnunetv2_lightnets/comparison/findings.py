"""What a comparison is about and what it finds: settings, tables of scores and differences, worst cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nnunetv2_lightnets.comparison.cases import Result, Structure, structure_label
from nnunetv2_lightnets.comparison.statistics import RESAMPLES, Interval

LEVEL = 0.05  # of every test
# A structure that is not in the reference: the case is left out for it, or counts 1 if the prediction has none either.
Empty = Literal["drop", "one"]


@dataclass(frozen=True)
class Settings:
    """What the user decided before looking at the numbers."""

    metrics: tuple[str, ...] = ("Dice",)  # the first is the main one
    margin: float = 0.01  # loss of the mean that still counts as non-inferior, in units of the metrics
    empty: Empty = "drop"
    nsd_tolerance: float | None = None  # where NSD is among the metrics
    nsd_unit: str = "mm"  # or "px"
    seed: int = 0  # of all resampling
    resamples: int = RESAMPLES


@dataclass
class Score:
    """One result in one table: its own mean and rank."""

    result: str
    mean: float
    interval: Interval | None
    deviation: float | None  # standard deviation over cases
    rank: float  # mean over cases, 1 is best
    first: float  # share of bootstrap samples in which it has the best mean


@dataclass
class Difference:
    """One result less the reference result, paired by case."""

    result: str
    mean: float
    interval: Interval | None
    p: float
    p_holm: float
    effect: float  # matched-pairs rank-biserial correlation
    wins: int
    ties: int
    losses: int
    lower: float | None  # one-sided bound of the non-inferiority test
    p_non_inferior: float | None
    p_non_inferior_holm: float | None
    verdict: str = ""

    @property
    def non_inferior(self) -> bool:
        """Whether non-inferiority is shown, after Holm's correction."""
        return self.p_non_inferior_holm is not None and self.p_non_inferior_holm <= LEVEL

    @property
    def differs(self) -> bool:
        """Whether a difference is shown, after Holm's correction."""
        return self.p_holm <= LEVEL


@dataclass
class Table:
    """One metric of one structure, or of the foreground mean."""

    metric: str
    title: str
    structure: Structure | None  # None for the foreground mean
    units: list[str]  # cases, or subjects
    values: NDArray[np.float64]  # (units, results)
    dropped: int  # cases that have no value here
    scores: list[Score] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    friedman: float | None = None


@dataclass(frozen=True)
class FalsePositives:
    """What a result predicts where the reference has nothing."""

    result: str
    title: str
    empty: int  # cases whose reference lacks the structure
    predicted: int  # of these, how many have it in the prediction


@dataclass(frozen=True)
class WorstCase:
    """A case in which a result falls behind the reference result."""

    result: str
    case: str
    fold: str | None
    difference: float  # of the case's foreground mean
    values: dict[str, tuple[float, float]]  # by structure: reference result, this result; NaN where dropped


@dataclass
class Comparison:
    """Everything that the report shows."""

    results: list[Result]  # the reference result first
    settings: Settings
    tables: list[Table]
    false_positives: list[FalsePositives]
    worst_cases: list[WorstCase]  # at most a few for each result, the worst first
    notes: list[str]
    subjects: int | None  # number of subjects, where cases were averaged within subjects

    @property
    def reference(self) -> Result:
        """The result that the others are compared with."""
        return self.results[0]

    @property
    def names(self) -> list[str]:
        """Names of all results, the reference first."""
        return [result.name for result in self.results]

    def overall(self, metric: str | None = None) -> Table:
        """The foreground mean of a metric; of the main metric by default."""
        metric = metric or self.settings.metrics[0]
        return next(t for t in self.tables if t.metric == metric and t.structure is None)

    def by_structure(self, metric: str) -> list[Table]:
        """The tables of single structures; empty where there is one structure only."""
        return [t for t in self.tables if t.metric == metric and t.structure is not None]


def structure_titles(results: Sequence[Result]) -> dict[Structure, str]:
    """What to call each structure: its name in any of the dataset.json files, else its label."""
    return {
        structure: next(
            (name for result in results if (name := result.structure_name(structure))), structure_label(structure)
        )
        for structure in results[0].structures
    }
