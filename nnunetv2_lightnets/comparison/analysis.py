"""From the scores of all cases to what the report says: every number of a comparison, and how it came about."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nnunetv2_lightnets import __version__
from nnunetv2_lightnets.comparison import statistics
from nnunetv2_lightnets.comparison.cases import Result, Structure, listed, structure_label
from nnunetv2_lightnets.comparison.statistics import Interval
from nnunetv2_lightnets.errors import LightNetsError

LEVEL = 0.05  # of every test
FEW_FOR_INTERVALS, FEW_FOR_FAILURES = 20, 50  # see benchmarks/results/statistics_checks.csv
Empty = Literal["drop", "one"]


@dataclass(frozen=True)
class Settings:
    """What the user decided before looking at the numbers.

    Attributes:
        metrics: metrics to compare, the first is the main one.
        margin: loss of the mean that still counts as non-inferior, in units of the metrics (0.01 is one Dice point).
        empty: what a structure counts that is not in the reference: ``drop`` leaves the case out for this structure,
            ``one`` counts 1 where the prediction has none either, else 0.
        nsd_tolerance: where NSD is among the metrics.
        nsd_unit: of the tolerance, ``mm`` or ``px``.
        seed: of all resampling.
        resamples: bootstrap samples.
    """

    metrics: tuple[str, ...] = ("Dice",)
    margin: float = 0.01
    empty: Empty = "drop"
    nsd_tolerance: float | None = None
    nsd_unit: str = "mm"
    seed: int = 0
    resamples: int = statistics.RESAMPLES


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
class Loss:
    """A case in which a result falls behind the reference result."""

    result: str
    case: str
    fold: str | None
    difference: float  # of the case's foreground mean
    values: dict[str, tuple[float, float]]  # by structure: reference result, this result; NaN where dropped


@dataclass
class Comparison:
    """Everything the report shows."""

    results: list[Result]  # the reference result first
    settings: Settings
    tables: list[Table]
    false_positives: list[FalsePositives]
    losses: list[Loss]
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


def compare(
    results: Sequence[Result],
    settings: Settings,
    *,
    subjects: Mapping[str, str] | None = None,
    worst: int = 3,
) -> Comparison:
    """Compare results with the first one; they must have passed ``check_comparable``.

    Args:
        results: the reference result first.
        settings: what was decided beforehand.
        subjects: subject of each case; the unit of all statistics is then the subject's mean over its cases.
        worst: how many of the largest losses to keep for each result.

    Raises:
        LightNetsError: the subjects do not name every case, or nothing is left to compare.
    """
    cases = sorted(results[0].cases)
    if subjects is not None and (missing := [case for case in cases if case not in subjects]):
        raise LightNetsError(f"--subjects names no subject for {listed(missing)}; name one for every case")
    tables = []
    for metric in settings.metrics:
        values = {s: _values(results, cases, metric, s, settings.empty) for s in results[0].structures}
        if all(np.isnan(v).all() for v in values.values()):
            raise LightNetsError(
                "every reference segmentation is empty, so there is nothing to compare; --empty one counts empty "
                "predictions as right"
            )
        overall = _nanmean(np.stack(list(values.values())))  # (structures, cases, results) -> (cases, results)
        titles = structure_titles(results)
        alone = len(titles) == 1
        title = next(iter(titles.values())) if alone else "foreground mean"
        family = [_table(metric, title, None, cases, overall, subjects)]
        _fill(family, [result.name for result in results], settings)
        tables += family
        if not alone:
            family = [
                _table(metric, titles[s], s, cases, v, subjects)
                for s, v in values.items()
                if not np.isnan(v).all()  # a structure that no reference has
            ]
            _fill(family, [result.name for result in results], settings)
            tables += family
    comparison = Comparison(
        list(results),
        settings,
        tables,
        _false_positives(results, cases),
        _losses(results, cases, settings, worst),
        [],
        None if subjects is None else len({subjects[case] for case in cases}),
    )
    comparison.notes = _notes(comparison)
    return comparison


def structure_titles(results: Sequence[Result]) -> dict[Structure, str]:
    """What to call each structure: its name in any of the dataset.json files, else its label."""
    return {
        structure: next(
            (name for result in results if (name := result.structure_name(structure))), structure_label(structure)
        )
        for structure in results[0].structures
    }


def read_subjects(file: Path) -> dict[str, str]:
    """Subject of each case, from a CSV file with the columns ``case`` and ``subject`` or a JSON object.

    Raises:
        LightNetsError: the file says something else.
    """
    wanted = f"{file} must be a CSV file with the columns case and subject, or a JSON object from case to subject"
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".json":
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise LightNetsError(wanted) from error
        if not isinstance(content, dict):
            raise LightNetsError(wanted)
        return {str(case): str(subject) for case, subject in content.items()}
    rows = csv.DictReader(text.splitlines())
    if not {"case", "subject"} <= set(rows.fieldnames or ()):
        raise LightNetsError(wanted)
    return {row["case"]: row["subject"] for row in rows}


def versions() -> dict[str, str]:
    """Versions of everything that made a number of the report."""
    names = ("nnunetv2", "numpy", "scipy", "matplotlib", "monai")
    installed = {name: _version(name) for name in names}
    return {
        "nnunetv2_lightnets": __version__,
        "Python": platform.python_version(),
        **{name: version for name, version in installed.items() if version is not None},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _values(
    results: Sequence[Result], cases: Sequence[str], metric: str, structure: Structure, empty: Empty
) -> NDArray[np.float64]:
    """Scores (cases, results) of one structure; NaN where the reference has none of it and such cases are dropped."""
    values = np.empty((len(cases), len(results)))
    for i, case in enumerate(cases):
        for j, result in enumerate(results):
            scores = result.cases[case].metrics[structure]
            if scores["n_ref"]:
                values[i, j] = scores[metric]
            elif empty == "one":
                values[i, j] = 0.0 if scores["n_pred"] else 1.0
            else:
                values[i, j] = np.nan
    return values


def _nanmean(stacked: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the first axis of what is not NaN; NaN where nothing is."""
    there = ~np.isnan(stacked)
    count = there.sum(axis=0)
    total = np.where(there, stacked, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _table(
    metric: str,
    title: str,
    structure: Structure | None,
    cases: Sequence[str],
    values: NDArray[np.float64],
    subjects: Mapping[str, str] | None,
) -> Table:
    there = [bool(np.isfinite(row).all()) for row in values]
    units = [case for case, keep in zip(cases, there, strict=True) if keep]
    values, dropped = values[there], len(cases) - len(units)
    if subjects is not None:
        of_subject = [subjects[case] for case in units]
        units = sorted(set(of_subject))
        values = np.stack([values[[s == unit for s in of_subject]].mean(axis=0) for unit in units])
    return Table(metric, title, structure, units, values, dropped)


def _fill(family: Sequence[Table], names: Sequence[str], settings: Settings) -> None:
    """Fill in the statistics of tables whose tests are corrected together: one family for Holm's correction."""
    from tqdm import tqdm

    resampling = {"resamples": settings.resamples, "seed": settings.seed}
    for table in tqdm(family, desc=f"bootstrap, {family[0].metric}", unit="table", leave=False):
        table.friedman = statistics.friedman(table.values)
        mean_ranks = statistics.ranks(table.values).mean(axis=0)
        first = statistics.first_place(table.values, **resampling)
        for j, name in enumerate(names):
            column = table.values[:, j]
            table.scores.append(
                Score(
                    name,
                    float(column.mean()),
                    statistics.mean_interval(column, **resampling),
                    float(column.std(ddof=1)) if len(column) > 1 else None,
                    float(mean_ranks[j]),
                    first[j],
                )
            )
        for j, name in enumerate(names[1:], start=1):
            change = statistics.as_values(table.values[:, j] - table.values[:, 0])
            test = statistics.non_inferiority(change, settings.margin, level=LEVEL, **resampling)
            table.differences.append(
                Difference(
                    name,
                    float(change.mean()),
                    statistics.mean_interval(change, **resampling),
                    p=statistics.wilcoxon(change),
                    p_holm=1.0,
                    effect=statistics.rank_biserial(change),
                    wins=int((change > 0).sum()),
                    ties=int((change == 0).sum()),
                    losses=int((change < 0).sum()),
                    lower=None if test is None else max(test.lower, -1.0),  # scores lie between 0 and 1
                    p_non_inferior=None if test is None else test.p,
                    p_non_inferior_holm=None,
                )
            )
    differences = [d for table in family for d in table.differences]
    for d, p in zip(differences, statistics.holm([d.p for d in differences]), strict=True):
        d.p_holm = p
    tested = [d for d in differences if d.p_non_inferior is not None]
    for d, p in zip(tested, statistics.holm([d.p_non_inferior or 0.0 for d in tested]), strict=True):
        d.p_non_inferior_holm = p
    for d in differences:
        d.verdict = verdict(d)


def verdict(d: Difference) -> str:
    """What the tests together say, in words that claim no more.

    The signed-rank test speaks of the typical case, non-inferiority of the mean: a few large failures can set them
    against each other, which is then said.
    """
    agree = d.mean * d.effect > 0
    if d.differs and agree and d.mean > 0:
        return "better" if d.non_inferior else "better, but non-inferiority of the mean is not shown"
    if d.differs and agree:
        return "worse, but within the margin" if d.non_inferior else "worse"
    if d.differs:
        typical, rest = ("better", "worse") if d.effect > 0 else ("worse", "better")
        shown = "within the margin" if d.non_inferior else "non-inferiority not shown"
        return f"{typical} in most cases, {rest} in the mean; {shown}"
    if d.non_inferior:
        return "non-inferior, no difference shown"
    return "inconclusive: neither a difference nor non-inferiority is shown"


def _false_positives(results: Sequence[Result], cases: Sequence[str]) -> list[FalsePositives]:
    found = []
    for structure, title in structure_titles(results).items():
        empty = [case for case in cases if results[0].cases[case].metrics[structure]["n_ref"] == 0]
        if empty:
            found += [
                FalsePositives(
                    result.name,
                    title,
                    len(empty),
                    sum(result.cases[case].metrics[structure]["n_pred"] > 0 for case in empty),
                )
                for result in results
            ]
    return found


def _losses(results: Sequence[Result], cases: Sequence[str], settings: Settings, worst: int) -> list[Loss]:
    """The largest losses of each result against the reference, by the main metric's foreground mean."""
    metric = settings.metrics[0]
    values = {s: _values(results, cases, metric, s, settings.empty) for s in results[0].structures}
    titles = structure_titles(results)
    overall = _nanmean(np.stack(list(values.values())))
    losses = []
    for j, result in enumerate(results[1:], start=1):
        d = np.nan_to_num(overall[:, j] - overall[:, 0], nan=0.0).round(12)
        for i in np.argsort(d, kind="stable")[:worst]:
            if d[i] < 0:
                by_title = {titles[s]: (float(v[i, 0]), float(v[i, j])) for s, v in values.items()}
                losses.append(
                    Loss(result.name, cases[i], results[0].cases[cases[i]].fold, float(d[i]), by_title),
                )
    return losses


def _notes(comparison: Comparison) -> list[str]:
    """What a reader must know before believing the numbers."""
    notes = []
    results, table = comparison.results, comparison.overall()
    n, unit = len(table.units), "subjects" if comparison.subjects is not None else "cases"
    if n < statistics.MIN_CASES:
        notes.append(f"Only {n} {unit}: no intervals and no non-inferiority test.")
    elif n < FEW_FOR_INTERVALS:
        notes.append(f"Only {n} {unit}: intervals and tests are rough, and few differences can be shown.")
    if statistics.MIN_CASES <= n < FEW_FOR_FAILURES:
        notes.append(
            f"With {n} {unit}, failures rarer than about 1 in {max(n // 3, 1)} may not be in the sample at all, and no "
            "test can see them: read non-inferiority with care."
        )
    budgets = {result.name: result.budgets for result in results if result.budgets}
    if len({b for noted in budgets.values() for b in noted}) > 1:
        notes.append(
            "Unequal training budgets: " + "; ".join(f"{name}: {', '.join(b)}" for name, b in budgets.items()) + "."
        )
    moved = [
        case
        for case in results[0].cases
        if len({r.cases[case].fold for r in results if r.cases[case].fold is not None}) > 1
    ]
    if moved:
        notes.append(f"The splits differ: {len(moved)} cases are in different folds ({listed(sorted(moved))}).")
    notes += [
        f"{d.result} equals {comparison.reference.name} in every case: are these the same predictions?"
        for d in table.differences
        if d.wins == d.losses == 0
    ]
    notes += [
        f"{result.name}: fold_all was trained on the cases it is scored on here."
        for result in results
        if "all" in result.folds
    ]
    folds = max((len(result.folds) for result in results), default=0)
    if folds == 1:
        notes.append("One fold, one training per network: the spread between trainings is not in these numbers.")
    dropped = {t.title: t.dropped for t in comparison.tables if t.metric == table.metric and t.dropped}
    compared = {t.title for t in comparison.tables}
    if len(results[0].structures) > 1:
        dropped |= {t: len(results[0].cases) for t in structure_titles(results).values() if t not in compared}
    if dropped:
        notes.append(
            "Left out, because the reference has nothing there: "
            + ", ".join(f"{n} cases of {title}" for title, n in dropped.items())
            + ". What the results predict in them is listed under empty references."
        )
    return notes
