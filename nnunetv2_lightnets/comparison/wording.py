"""A comparison in words: title, verdicts, what to beware of, how it was computed, and numbers as texts show them."""

from __future__ import annotations

from collections.abc import Callable

from nnunetv2_lightnets.comparison.cases import listed
from nnunetv2_lightnets.comparison.findings import LEVEL, Comparison, Difference, structure_titles
from nnunetv2_lightnets.comparison.statistics import MIN_CASES, Interval
from nnunetv2_lightnets.pages.names import Names
from nnunetv2_lightnets.pages.text import NOTHING, number, signed

_NAMED = 2  # so many results still have their names in the title
FEW_FOR_INTERVALS, FEW_FOR_FAILURES = 20, 50  # cases, see benchmarks/results/statistics_checks.csv


def p_value(value: float | None) -> str:
    """``0.032``, or ``<0.001``."""
    return NOTHING if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def interval(bounds: Interval | None, form: Callable[[float], str] = number) -> str:
    """``0.85 to 0.89``."""
    return NOTHING if bounds is None else f"{form(bounds.low)} to {form(bounds.high)}"


def share(value: float) -> str:
    """``83 %``."""
    return f"{100 * value:.0f} %"


def title(comparison: Comparison, names: Names) -> str:
    """What is compared with what: ``5 results against nnUNetTrainer on Dataset504_Hippocampus``."""
    others = [names.label(name) for name in comparison.names[1:]]
    what = " and ".join(others) if len(others) <= _NAMED else f"{len(others)} results"
    datasets = {result.dataset for result in comparison.results}
    on = f" on {datasets.pop()}" if len(datasets) == 1 and None not in datasets else ""
    return f"{what} against {names.label(comparison.reference.name)}{on}"


def lead(comparison: Comparison, names: Names) -> str:
    """What was scored on how many cases, and what all results share, which their labels leave out."""
    table, settings = comparison.overall(), comparison.settings
    shared = dict(names.shared)
    budgets = {result.budgets for result in comparison.results}
    if len(budgets) == 1 and len(noted := budgets.pop()) == 1:
        shared["budget"] = noted[0]  # nnU-Net's own note says more than the name
    of_all = f" All results: {', '.join(shared.values())}." if shared else ""
    return (
        f"{table.metric}, {table.title}. {len(table.units)} {unit(comparison)}s.{of_all} "
        f"Non-inferiority margin {settings.margin:g}, set beforehand."
    )


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


def notes(comparison: Comparison, label: Callable[[str], str] = str) -> list[str]:
    """What a reader must know before believing the numbers; ``label`` says what to call a result."""
    notes = []
    results, table = comparison.results, comparison.overall()
    n, units = len(table.units), f"{unit(comparison)}s"
    if n < MIN_CASES:
        notes.append(f"Only {n} {units}: no intervals and no non-inferiority test.")
    elif n < FEW_FOR_INTERVALS:
        notes.append(f"Only {n} {units}: intervals and tests are rough, and few differences can be shown.")
    if MIN_CASES <= n < FEW_FOR_FAILURES:
        notes.append(
            f"With {n} {units}, failures rarer than about 1 in {max(n // 3, 1)} may not be in the sample at all, and "
            "no test can see them: read non-inferiority with care."
        )
    budgets = {label(result.name): result.budgets for result in results if result.budgets}
    if len({b for noted in budgets.values() for b in noted}) > 1:
        notes.append(
            "Unequal training budgets: " + "; ".join(f"{name}: {', '.join(b)}" for name, b in budgets.items()) + "."
        )
    folds = {case: {result.cases[case].fold for result in results} - {None} for case in results[0].cases}
    if moved := [case for case in folds if len(folds[case]) > 1]:
        notes.append(f"The splits differ: {len(moved)} cases are in different folds ({listed(sorted(moved))}).")
    notes += [
        f"{label(d.result)} equals {label(comparison.reference.name)} in every case: are these the same predictions?"
        for d in table.differences
        if d.wins == d.losses == 0
    ]
    notes += [
        f"{label(result.name)}: fold_all was trained on the cases it is scored on here."
        for result in results
        if "all" in result.folds
    ]
    if max(len(result.folds) for result in results) == 1:
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


def unit(comparison: Comparison) -> str:
    """What one value of the statistics stands for."""
    return "case" if comparison.subjects is None else "subject"


def methods(comparison: Comparison) -> list[tuple[str, str]]:
    """How every number was made, as (what, how)."""
    settings, table = comparison.settings, comparison.overall()
    several = len(comparison.results) > 2
    n_structures = len(comparison.reference.structures)
    one = unit(comparison)
    aggregation = f"Mean over {one}s."
    if n_structures > 1:
        aggregation = (
            f"Foreground mean: each case's mean over its {n_structures} structures, without background, then the mean "
            f"over {one}s."
        )
    if comparison.subjects is not None:
        aggregation += f" Cases of one subject are averaged first: {comparison.subjects} subjects."
    empty = {
        "drop": "A case whose reference lacks a structure is left out for this structure, for all results alike, "
        "whatever they predict there; such false positives are counted apart.",
        "one": "Where the reference lacks a structure, a prediction that lacks it, too, counts 1, any other 0.",
    }[settings.empty]
    metric = {m: f"{m} (nnU-Net's own evaluation, per case, at the original resolution)" for m in ("Dice", "IoU")}
    metric["NSD"] = f"NSD at {settings.nsd_tolerance or 0:g} {settings.nsd_unit} (MONAI, sub-voxel surface areas)"
    families = (
        "one family is all results"
        if n_structures == 1
        else "one family is the foreground mean of all results, another all structures of all results"
    )
    return [
        ("Metric", "; ".join(metric.get(m, m) for m in settings.metrics) + ". More is better."),
        ("Cases", f"{len(comparison.reference.cases)}, the same for all results, from {_folds(comparison)}."),
        ("Aggregation", aggregation),
        ("Empty references", empty),
        (
            "Intervals",
            f"95 %, bootstrap over {one}s ({settings.resamples} samples, seed {settings.seed}), percentiles widened "
            f"for few {one}s (Hesterberg 2015); of differences: paired. They cover the choice of {one}s, not the "
            "spread between trainings.",
        ),
        (
            "Difference",
            f"Wilcoxon's signed-rank test, two-sided; a {one} without a difference is left out. r: matched-pairs "
            f"rank-biserial correlation, from −1 (loses every {one}) to 1 (wins every {one}).",
        ),
        (
            "Non-inferiority",
            f"One-sided test of a mean loss of {settings.margin:g} or more at level {LEVEL:g}: the stricter one of the "
            "paired t test and the bootstrap t. The bound is one-sided, 95 %, not corrected.",
        ),
        (
            "Correction",
            f"Holm's, within a metric: {families}. Differences and non-inferiority are corrected alike; metrics are "
            "not corrected for each other.",
        ),
        (
            "Ranks",
            f"Mean over {one}s of the rank within the {one}, ties share"
            + (f"; Friedman's test: p {p_value(table.friedman)}" if several and table.friedman is not None else "")
            + f". First: share of bootstrap samples of {one}s in which the result has the best mean.",
        ),
    ]


def _folds(comparison: Comparison) -> str:
    folds = comparison.reference.folds
    if not folds:
        return "one set of predictions"
    return f"fold {folds[0]}" if len(folds) == 1 else f"{len(folds)} folds ({', '.join(folds)})"


def text_summary(comparison: Comparison) -> str:
    """The main result in a few lines, for the terminal."""
    table, settings = comparison.overall(), comparison.settings
    width = max(len(name) for name in comparison.names)
    lines = [
        f"{table.metric}, {table.title}, {len(table.units)} {unit(comparison)}s, reference "
        f"{comparison.reference.name}, margin {settings.margin:g}"
    ]
    for i, score in enumerate(table.scores):
        line = f"{score.result:<{width}}  {number(score.mean)}"
        if i:
            d = table.differences[i - 1]
            line += f"  {signed(d.mean)} ({interval(d.interval, signed)})  p {p_value(d.p_holm)}  {d.verdict}"
        lines.append(line)
    return "\n".join([*lines, *(f"Note: {note}" for note in comparison.notes)])
