"""The papers' own settings: one file each in ``plans/reference``, every number with its source.

A value of null is not stated where we could read; the planner then decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nnunetv2_lightnets.errors import LightNetsError

_FOLDER = Path(__file__).with_name("reference")
SETTINGS = ("patch", "batch_size", "epochs", "deep_supervision", "learning_rate")


@dataclass(frozen=True)
class ReferenceSetting:
    """Settings of a paper for a data set."""

    name: str  # what --like takes
    title: str  # network and data set
    paper: str  # where they were published
    trainer: str  # ours of that network
    dims: int  # 2 or 3
    settings: Mapping[str, Mapping[str, Any]]  # for each of SETTINGS its "value", None if unknown, and its "source"

    def fixed(self) -> dict[str, dict[int, Any]]:
        """Patch and batch size, as far as they are known, as the planner takes them."""
        known = {key: self.settings[key]["value"] for key in ("patch", "batch_size")}
        return {key: {self.dims: value} for key, value in known.items() if value is not None}

    def lines(self) -> list[str]:
        """Each setting with its source, for people."""
        return [
            f"  {key.replace('_', ' ')}: {'unknown' if entry['value'] is None else entry['value']} ({entry['source']})"
            for key, entry in self.settings.items()
        ]


def reference_names() -> list[str]:
    """What ``--like`` takes."""
    return sorted(file.stem for file in _FOLDER.glob("*.json"))


def reference_setting(name: str) -> ReferenceSetting:
    """The settings called ``name``.

    Raises:
        LightNetsError: there are none.
    """
    if name not in reference_names():
        likely = get_close_matches(name, reference_names()) or reference_names()
        raise LightNetsError(f"there are no settings --like {name}; did you mean {', '.join(likely)}?")
    content = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return ReferenceSetting(name=name, **content)
