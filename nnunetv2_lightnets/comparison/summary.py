"""nnU-Net's ``summary.json``: the scores of all cases of one folder.

``nnunetv2.evaluation.evaluate_predictions`` writes it: for each case and each label or region Dice, IoU and voxel
counts; NaN where a structure is in neither the reference nor the prediction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nnunetv2_lightnets.comparison.cases import Case, Structure, as_structure, case_name, shown_structures
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import read_json

SUMMARY = "summary.json"


def read_summary(file: Path, fold: str | None = None) -> list[Case]:
    """The cases of one summary.json.

    Files are looked for where the summary says, then beside it (result folders get moved).

    Raises:
        LightNetsError: the file is truncated, or is not what nnU-Net writes; says where.
    """
    content = read_json(file, "score the predictions again with nnUNetv2_evaluate_folder")
    entries = content.get("metric_per_case")
    if not isinstance(entries, list) or not entries:
        raise LightNetsError(f"{file} has no cases under metric_per_case; nnU-Net's {SUMMARY} is needed")
    cases: list[Case] = []
    for i, entry in enumerate(entries):
        where = f"{file}, case {i + 1} of {len(entries)}"
        if not isinstance(entry, dict) or not isinstance(entry.get("metrics"), dict):
            raise LightNetsError(f"{where} has no metrics; nnU-Net's {SUMMARY} is needed")
        files = [entry.get("reference_file"), entry.get("prediction_file")]
        if not all(isinstance(f, str) and f for f in files):
            raise LightNetsError(f"{where} names no reference_file and prediction_file; nnU-Net's {SUMMARY} is needed")
        reference, prediction = (Path(str(f)) for f in files)
        name = case_name(prediction)
        if not prediction.is_file():
            moved = file.parent / re.split(r"[/\\]", str(prediction))[-1]
            prediction = moved if moved.is_file() else prediction
        if any(case.name == name for case in cases):
            raise LightNetsError(f"{file} holds case {name} twice; score the predictions again")
        cases.append(Case(name, fold, reference, prediction, checked_metrics(entry["metrics"], f"{file}, case {name}")))
    return cases


def checked_metrics(content: Mapping[str, Any], where: str) -> dict[Structure, dict[str, float]]:
    """Metrics of one case, checked; background is left out, as in nnU-Net's foreground mean."""
    metrics: dict[Structure, dict[str, float]] = {}
    for key, values in content.items():
        structure = as_structure(key)
        if structure is None or not isinstance(values, dict):
            raise LightNetsError(f"{where}: {key!r} is no label and no region")
        if structure == (0,):
            continue
        numbers: dict[str, float] = {}
        for metric, value in values.items():
            value = math.nan if value is None else value
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise LightNetsError(f"{where}, label {key}: {metric} is {value!r}, not a number")
            numbers[metric] = float(value)
        for count in ("n_ref", "n_pred"):
            if not (numbers.get(count, -1.0) >= 0):
                raise LightNetsError(
                    f"{where}, label {key} has no {count}, which says where the structure is absent; score the "
                    "predictions again with nnUNetv2_evaluate_folder"
                )
        metrics[structure] = numbers
    return metrics


def structures_of(name: str, cases: Iterable[Case]) -> tuple[Structure, ...]:
    """The structures that all cases of a result hold, in nnU-Net's order."""
    first: Case | None = None
    for case in cases:
        first = first or case
        if set(case.metrics) != set(first.metrics):
            raise LightNetsError(
                f"{name}: case {first.name} is scored for {shown_structures(first.metrics)} and case {case.name} for "
                f"{shown_structures(case.metrics)}; score all cases for the same labels"
            )
    if first is None or not first.metrics:
        raise LightNetsError(f"{name} holds no scores of any foreground label")
    return tuple(sorted(first.metrics, key=lambda s: (s if len(s) == 1 else (0,), -len(s), s)))
