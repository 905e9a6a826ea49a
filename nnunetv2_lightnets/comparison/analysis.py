"""From the scores of all cases to every number of a comparison, and how it came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nnunetv2_lightnets.comparison import statistics
from nnunetv2_lightnets.comparison.cases import Result, Structure, listed
from nnunetv2_lightnets.comparison.findings import (
    LEVEL,
    Comparison,
    Difference,
    Empty,
    FalsePositives,
    Score,
    Settings,
    Table,
    WorstCase,
    structure_titles,
)
from nnunetv2_lightnets.comparison.wording import notes, verdict
from nnunetv2_lightnets.errors import LightNetsError


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
    names, titles = [result.name for result in results], structure_titles(results)
    tables = []
    for metric in settings.metrics:
        values, overall = _scores(results, cases, metric, settings.empty)
        if all(np.isnan(v).all() for v in values.values()):
            raise LightNetsError(
                "every reference segmentation is empty, so there is nothing to compare; --empty one counts empty "
                "predictions as correct"
            )
        title = "foreground mean" if len(titles) > 1 else next(iter(titles.values()))
        families = [[_table(metric, title, None, cases, overall, subjects)]]
        if len(titles) > 1:
            there = {s: v for s, v in values.items() if not np.isnan(v).all()}  # in some reference segmentation
            families.append([_table(metric, titles[s], s, cases, v, subjects) for s, v in there.items()])
        for family in families:
            _fill(family, names, settings)
            tables += family
    comparison = Comparison(
        list(results),
        settings,
        tables,
        _false_positives(results, cases),
        _worst_cases(results, cases, settings, worst),
        [],
        None if subjects is None else len({subjects[case] for case in cases}),
    )
    comparison.notes = notes(comparison)
    return comparison


def _scores(
    results: Sequence[Result], cases: Sequence[str], metric: str, empty: Empty
) -> tuple[dict[Structure, NDArray[np.float64]], NDArray[np.float64]]:
    """Scores (cases, results) of each structure, and their mean over structures; NaN where nothing is scored."""

    def score(scores: Mapping[str, float]) -> float:
        if scores["n_ref"]:
            return scores[metric]
        if empty == "one":
            return 0.0 if scores["n_pred"] else 1.0
        return np.nan

    values = {
        s: np.array([[score(result.cases[case].metrics[s]) for result in results] for case in cases])
        for s in results[0].structures
    }
    stacked = np.stack(list(values.values()))  # (structures, cases, results)
    return values, np.ma.masked_invalid(stacked).mean(axis=0).filled(np.nan)


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
            values = table.values[:, j]
            interval = statistics.mean_interval(values, **resampling)
            deviation = float(values.std(ddof=1)) if len(values) > 1 else None
            table.scores.append(Score(name, float(values.mean()), interval, deviation, float(mean_ranks[j]), first[j]))
            if j > 0:
                table.differences.append(_difference(name, values - table.values[:, 0], settings))
    differences = [d for table in family for d in table.differences]
    for d, p in zip(differences, statistics.holm([d.p for d in differences]), strict=True):
        d.p_holm = p
    tested = [d for d in differences if d.p_non_inferior is not None]
    for d, p in zip(tested, statistics.holm([d.p_non_inferior or 0.0 for d in tested]), strict=True):
        d.p_non_inferior_holm = p
    for d in differences:
        d.verdict = verdict(d)


def _difference(name: str, changes: NDArray[np.float64], settings: Settings) -> Difference:
    """The statistics of one result's differences from the reference result, one per case; not yet corrected."""
    resampling = {"resamples": settings.resamples, "seed": settings.seed}
    changes = statistics.as_values(changes)
    test = statistics.non_inferiority(changes, settings.margin, level=LEVEL, **resampling)
    return Difference(
        name,
        float(changes.mean()),
        statistics.mean_interval(changes, **resampling),
        p=statistics.wilcoxon(changes),
        p_holm=1.0,
        effect=statistics.rank_biserial(changes),
        wins=int((changes > 0).sum()),
        ties=int((changes == 0).sum()),
        losses=int((changes < 0).sum()),
        lower=None if test is None else max(test.lower, -1.0),  # scores lie between 0 and 1
        p_non_inferior=None if test is None else test.p,
        p_non_inferior_holm=None,
    )


def _false_positives(results: Sequence[Result], cases: Sequence[str]) -> list[FalsePositives]:
    found = []
    for structure, title in structure_titles(results).items():
        empty = [case for case in cases if results[0].cases[case].metrics[structure]["n_ref"] == 0]
        for result in results if empty else ():
            predicted = sum(result.cases[case].metrics[structure]["n_pred"] > 0 for case in empty)
            found.append(FalsePositives(result.name, title, len(empty), predicted))
    return found


def _worst_cases(results: Sequence[Result], cases: Sequence[str], settings: Settings, worst: int) -> list[WorstCase]:
    """The largest losses of each result against the reference, by the main metric's foreground mean."""
    values, overall = _scores(results, cases, settings.metrics[0], settings.empty)
    titles = structure_titles(results)
    found = []
    for j, result in enumerate(results[1:], start=1):
        d = np.nan_to_num(overall[:, j] - overall[:, 0], nan=0.0).round(12)
        for i in np.argsort(d, kind="stable")[:worst]:
            if d[i] < 0:
                by_title = {titles[s]: (float(v[i, 0]), float(v[i, j])) for s, v in values.items()}
                fold = results[0].cases[cases[i]].fold
                found.append(WorstCase(result.name, cases[i], fold, float(d[i]), by_title))
    return found
