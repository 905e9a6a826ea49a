"""What may be compared: results of the same cases, structures, metrics and labels, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nnunetv2_lightnets.comparison.cases import Case, Result, Structure, listed, shown_structures, structure_label
from nnunetv2_lightnets.errors import LightNetsError


def check_comparable(results: Sequence[Result], metrics: Sequence[str]) -> None:
    """Refuse, by a LightNetsError, results not scored on the same cases, structures, metrics and labels."""
    first = results[0]
    for other in results[1:]:
        _check_cases_and_structures(first, other)
        _check_cases_and_structures(other, first)
        for structure in first.structures:
            names = first.structure_name(structure), other.structure_name(structure)
            if None not in names and names[0] != names[1]:
                raise LightNetsError(
                    f"{structure_label(structure)} is {names[0]!r} in {first.name} and {names[1]!r} in {other.name}; "
                    "these are different data sets"
                )
    for result in results:
        if missing := [metric for metric in metrics if metric not in result.metrics()]:
            raise LightNetsError(
                f"{result.name} has no {listed(missing)}; it has {listed(sorted(result.metrics()))}, "
                "choose among these with --metrics"
            )
        for case in result.cases.values():
            for structure in result.structures:
                _check_scores(result, case, structure, metrics)
                _check_reference(first, result, case, structure)


def _check_cases_and_structures(has: Result, lacks: Result) -> None:
    if missing := sorted(set(has.cases) - set(lacks.cases)):
        raise LightNetsError(
            f"{lacks.name} lacks {len(missing)} of the {len(has.cases)} cases of {has.name}: {listed(missing)}; "
            "compare the same cases, for instance the same folds with -f"
        )
    if gone := sorted(set(has.structures) - set(lacks.structures)):
        raise LightNetsError(
            f"{lacks.name} is not scored for {shown_structures(gone)}, which {has.name} is; "
            "score both for the same labels"
        )


def _check_scores(result: Result, case: Case, structure: Structure, metrics: Sequence[str]) -> None:
    values = case.metrics[structure]
    absent = values["n_ref"] == 0 and values["n_pred"] == 0
    where = f"{result.name}, case {case.name}, {structure_label(structure)}"
    for metric in metrics:
        value = values[metric]
        if math.isnan(value) and not absent:
            raise LightNetsError(f"{where}: {metric} is NaN though the structure is there; score the predictions again")
        if not math.isnan(value) and not 0 <= value <= 1:
            raise LightNetsError(
                f"{where}: {metric} is {value:g}; only scores between 0 and 1 where more is better can be compared"
            )


def _check_reference(first: Result, result: Result, case: Case, structure: Structure) -> None:
    """Equal names are not enough: the reference must have as many voxels in both."""
    here, there = (r.cases[case.name].metrics[structure]["n_ref"] for r in (result, first))
    if here != there:
        raise LightNetsError(
            f"case {case.name}, {structure_label(structure)}: the reference has {there:.0f} voxels in {first.name} "
            f"and {here:.0f} in {result.name}; score both against the same labels"
        )
