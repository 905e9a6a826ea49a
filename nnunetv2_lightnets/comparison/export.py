"""A comparison for programs: every number as CSV and JSON."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nnunetv2_lightnets import __version__
from nnunetv2_lightnets.comparison.findings import LEVEL, Comparison, Difference, Score, structure_titles
from nnunetv2_lightnets.comparison.wording import methods


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One row for each metric, structure and result."""
    found = []
    for table in comparison.tables:
        differences: Sequence[Difference | None] = [None, *table.differences]
        for score, difference in zip(table.scores, differences, strict=True):
            found.append(
                {"metric": table.metric, "structure": table.title, "n": len(table.units), "dropped": table.dropped}
                | _score_row(score)
                | _difference_row(difference)
            )
    return found


def _score_row(score: Score) -> dict[str, Any]:
    bounds = score.interval
    return {
        "result": score.result,
        "mean": score.mean,
        "ci_low": bounds and bounds.low,
        "ci_high": bounds and bounds.high,
        "sd": score.deviation,
        "mean_rank": score.rank,
        "share_first": score.first,
    }


def _difference_row(d: Difference | None) -> dict[str, Any]:
    bounds = d and d.interval
    return {
        "difference": d and d.mean,
        "difference_ci_low": bounds and bounds.low,
        "difference_ci_high": bounds and bounds.high,
        "p_wilcoxon": d and d.p,
        "p_wilcoxon_holm": d and d.p_holm,
        "rank_biserial": d and d.effect,
        "wins": d and d.wins,
        "ties": d and d.ties,
        "losses": d and d.losses,
        "non_inferiority_lower_bound": d and d.lower,
        "p_non_inferiority": d and d.p_non_inferior,
        "p_non_inferiority_holm": d and d.p_non_inferior_holm,
        "non_inferior": d and d.non_inferior,
        "verdict": d and d.verdict,
    }


def case_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One row for each case, metric and structure, as nnU-Net scored it, a column for each result."""
    rows: list[dict[str, Any]] = []
    for case, of_reference in sorted(comparison.reference.cases.items()):
        for metric in comparison.settings.metrics:
            for structure, title in structure_titles(comparison.results).items():
                row: dict[str, Any] = {
                    "case": case,
                    "fold": of_reference.fold,
                    "metric": metric,
                    "structure": title,
                    "reference_voxels": int(of_reference.metrics[structure]["n_ref"]),
                }
                row.update({r.name: _known(r.cases[case].metrics[structure][metric]) for r in comparison.results})
                rows.append(row)
    return rows


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison for programs; what is not known is null."""
    return {
        "reference": comparison.reference.name,
        "results": [
            {
                "name": r.name,
                "folder": str(r.folder),
                "folds": list(r.folds),
                "budgets": list(r.budgets),
                "cases": len(r.cases),
            }
            for r in comparison.results
        ],
        "settings": asdict(comparison.settings) | {"level": LEVEL, "subjects": comparison.subjects},
        "methods": dict(methods(comparison)),
        "notes": comparison.notes,
        "versions": versions(),
        "tables": [
            {
                "metric": t.metric,
                "structure": t.title,
                "n": len(t.units),
                "dropped": t.dropped,
                "p_friedman": t.friedman,
                "results": [
                    _score_row(s) | (_difference_row(d) if d else {})
                    for s, d in zip(t.scores, [None, *t.differences], strict=True)
                ],
            }
            for t in comparison.tables
        ],
        "empty_references": [asdict(f) for f in comparison.false_positives],
        "largest_losses": [
            {"result": x.result, "case": x.case, "fold": x.fold, "difference": x.difference}
            | {"values": {k: [_known(a), _known(b)] for k, (a, b) in x.values.items()}}
            for x in comparison.worst_cases
        ],
        "cases": case_rows(comparison),
    }


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
