"""A comparison for programs: every number as CSV and JSON."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import platform
from dataclasses import asdict
from typing import Any

from nnunetv2_lightnets import __version__
from nnunetv2_lightnets.comparison.findings import LEVEL, Comparison, Table, structure_titles
from nnunetv2_lightnets.comparison.statistics import Interval
from nnunetv2_lightnets.comparison.wording import methods


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One row for each metric, structure and result."""
    return [_heading(table) | row for table in comparison.tables for row in _result_rows(table)]


def _heading(table: Table) -> dict[str, Any]:
    return {"metric": table.metric, "structure": table.title, "n": len(table.units), "dropped": table.dropped}


def _result_rows(table: Table) -> list[dict[str, Any]]:
    """A row for each result; that of the reference has no difference."""
    found: list[dict[str, Any]] = []
    for s in table.scores:
        own = {"result": s.result, "mean": s.mean, **_bounds("ci", s.interval), "sd": s.deviation}
        found.append(own | {"mean_rank": s.rank, "share_first": s.first})
    for row, d in zip(found[1:], table.differences, strict=True):
        row |= {
            "difference": d.mean,
            **_bounds("difference_ci", d.interval),
            "p_wilcoxon": d.p,
            "p_wilcoxon_holm": d.p_holm,
            "rank_biserial": d.effect,
            "wins": d.wins,
            "ties": d.ties,
            "losses": d.losses,
            "non_inferiority_lower_bound": d.lower,
            "p_non_inferiority": d.p_non_inferior,
            "p_non_inferiority_holm": d.p_non_inferior_holm,
            "non_inferior": d.non_inferior,
            "verdict": d.verdict,
        }
    return found


def _bounds(name: str, interval: Interval | None) -> dict[str, float | None]:
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return {f"{name}_low": low, f"{name}_high": high}


def case_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One row for each case, metric and structure, as nnU-Net scored it, a column for each result."""
    titles = structure_titles(comparison.results)
    return [
        {
            "case": case,
            "fold": of_reference.fold,
            "metric": metric,
            "structure": title,
            "reference_voxels": int(of_reference.metrics[structure]["n_ref"]),
            **{r.name: _known(r.cases[case].metrics[structure][metric]) for r in comparison.results},
        }
        for case, of_reference in sorted(comparison.reference.cases.items())
        for metric in comparison.settings.metrics
        for structure, title in titles.items()
    ]


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
        "tables": [_heading(t) | {"p_friedman": t.friedman, "results": _result_rows(t)} for t in comparison.tables],
        "empty_references": [asdict(f) for f in comparison.false_positives],
        "largest_losses": [
            asdict(worst) | {"values": {title: [*map(_known, pair)] for title, pair in worst.values.items()}}
            for worst in comparison.worst_cases
        ],
        "cases": case_rows(comparison),
    }


def versions() -> dict[str, str]:
    """Versions of everything that made a number of the report."""
    found = {"nnunetv2_lightnets": __version__, "Python": platform.python_version()}
    for name in ("nnunetv2", "numpy", "scipy", "matplotlib", "monai"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # MONAI is optional
            found[name] = importlib.metadata.version(name)
    return found
