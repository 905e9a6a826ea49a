"""What is compared: cases with their scores, and the structures that are scored."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A structure is a set of label values: (1,) is label 1, (1, 2, 3) is a region made of three labels.
Structure = tuple[int, ...]

IGNORE = "ignore"  # nnU-Net's name for voxels that are not scored
_SHOWN = 5  # names in an error message


@dataclass
class Case:
    """The scores of one case."""

    name: str  # of its files, without their ending
    fold: str | None  # whose network predicted it, or None where the folder does not say
    reference: Path  # segmentation
    prediction: Path
    metrics: dict[Structure, dict[str, float]]  # by name, as in metrics[(1,)]["Dice"]; NaN where undefined


@dataclass
class Result:
    """All cases of one trained model, pooled over its folds."""

    name: str
    folder: Path
    cases: dict[str, Case]
    structures: tuple[Structure, ...]
    dataset_json: dict[str, Any] = field(default_factory=dict)
    budgets: tuple[str, ...] = ()  # of its folds, as nnU-Net noted them; one entry where all are equal

    @property
    def folds(self) -> tuple[str, ...]:
        """Folds the cases come from; empty where the folder does not say."""
        return tuple(sorted({case.fold for case in self.cases.values() if case.fold is not None}))

    @property
    def dataset(self) -> str | None:
        """nnU-Net's name of the data set, where the folder lies in a folder of that name."""
        parts = reversed(self.folder.resolve().parts)
        return next((part for part in parts if re.match(r"Dataset\d{3}_", part)), None)

    @property
    def ignore_label(self) -> int | None:
        """The label whose voxels are not scored, or None."""
        value = self.dataset_json.get("labels", {}).get(IGNORE)
        return value if isinstance(value, int) else None

    def structure_name(self, structure: Structure) -> str | None:
        """The name that dataset.json gives to a structure, or None."""
        for name, value in self.dataset_json.get("labels", {}).items():
            if name != IGNORE and as_structure(value) == structure:
                return str(name)
        return None

    def metrics(self) -> set[str]:
        """Metrics that every case has for every structure."""
        return set.intersection(*(set(m) for case in self.cases.values() for m in case.metrics.values()))


def as_structure(value: Any) -> Structure | None:
    """``1``, ``"1"``, ``[1, 2]`` or nnU-Net's ``"(1, 2)"`` as a sorted tuple; None if it is no label at all."""
    if isinstance(value, str):
        if not re.fullmatch(r"\(?\s*\d+\s*(,\s*\d+\s*)*,?\s*\)?", value):
            return None
        value = [int(part) for part in re.findall(r"\d+", value)]
    elif isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, (list, tuple)) and all(isinstance(part, int) for part in value):
        return tuple(sorted(set(value)))
    return None


def case_name(file: str | Path) -> str:
    """``case_1`` for ``/a/case_1.nii.gz``, also for a path written on Windows."""
    name = re.split(r"[/\\]", str(file))[-1]
    return name[: -len(".nii.gz")] if name.endswith(".nii.gz") else name.rpartition(".")[0] or name


def listed(names: Iterable[str]) -> str:
    """A few names for an error message, and how many more there are."""
    names = list(names)
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def shown_structures(structures: Iterable[Structure]) -> str:
    """Structures for an error message."""
    return listed([structure_label(s) for s in sorted(structures)]) or "nothing"


def structure_label(structure: Structure) -> str:
    """``label 1`` or ``region (1, 2)``."""
    return f"label {structure[0]}" if len(structure) == 1 else f"region {structure}"
