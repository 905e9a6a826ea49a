"""Names of results on a page: the label says what tells a result from the others, the page says once what all share.

A result is named as nnU-Net names its folder, ``TRAINER[_BUDGET][__PLANS[__CONFIGURATION]]``, for instance
``nnUNetTrainerULite_4epochs_250iters__nnUNetPlans__3d_fullres``, or as the user calls it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nnunetv2_lightnets.nnunet.trainer_names import BUDGET

_NAME = re.compile(
    rf"(?P<trainer>nnUNetTrainer.*?)(?P<budget>(?:{BUDGET.pattern})*)(?:__(?P<plans>.+?)(?:__(?P<configuration>.+))?)?"
)
_LONGEST = 24  # characters beside a chart


@dataclass(frozen=True)
class Names:
    """The names of a page."""

    labels: dict[str, str]  # by name, in the order given; distinct, and never empty
    shared: dict[str, str]  # left out of every label: the trainer, budget, plans and configuration, in this order

    def label(self, name: str) -> str:
        """The label of a name; a name that is not on the page is its own label."""
        return self.labels.get(name, name)

    def for_charts(self) -> dict[str, str]:
        """The labels, short enough to stand beside a chart."""
        return dict(zip(self.labels, shortened(list(self.labels.values())), strict=True))


def page_names(names: Sequence[str]) -> Names:
    """Labels without what all names share: ``nnUNetTrainer``, the budget, the plans, the configuration.

    The plain ``nnUNetTrainer`` keeps its name, and names that are not nnU-Net's stay as they are. Where two labels
    would be equal, both are the full names.
    """
    nothing = dict.fromkeys(_NAME.groupindex, "")
    found = {
        name: match.groupdict("") if (match := _NAME.fullmatch(name)) else {**nothing, "trainer": name}
        for name in names
    }
    values = {part: {parts[part] for parts in found.values()} for part in _NAME.groupindex}
    differ = {part for part, of_all in values.items() if len(of_all) > 1}
    if len(values["configuration"] - {""}) == 1:  # a name without one says nothing about it
        differ.discard("configuration")
    if "" in {_label(parts, differ) for parts in found.values()}:
        differ.add("trainer")
    labels = {name: _label(parts, differ) for name, parts in found.items()}
    shown = list(labels.values())
    labels = {name: label if shown.count(label) == 1 else name for name, label in labels.items()}
    shared = {part: next(iter(of_all)) for part, of_all in values.items() if len(of_all) == 1 and part not in differ}
    shared["budget"] = budget_in_words(shared.get("budget", ""))
    return Names(labels, {part: shared[part] for part in _NAME.groupindex if shared.get(part)})


def _label(parts: dict[str, str], wanted: set[str]) -> str:
    trainer, budget, plans, configuration = (parts[part] if part in wanted else "" for part in _NAME.groupindex)
    trainer = re.sub("^nnUNetTrainer(?=.)", "", trainer)
    if plans != "nnUNetPlans":
        plans = re.sub("^nnUNet(.+)Plans$", r"\1", plans)
    return " ".join(part for part in (trainer + budget if trainer else budget[1:], plans, configuration) if part)


def budget_in_words(suffix: str) -> str:
    """``4 epochs of 250 iterations`` for ``_4epochs_250iters``; empty for an empty suffix."""
    numbers = {unit: f"{number} {unit}" for number, unit in BUDGET.findall(suffix)}
    if "iters" in numbers:
        return f"{numbers.get('epochs', 'epochs')} of {numbers['iters'].replace('iters', 'iterations')}"
    return numbers.get("epochs", "")


def short(name: str, length: int = _LONGEST) -> str:
    """A name of at most ``length`` characters: its middle is left out where it is longer."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length // 2) :]}"


def shortened(names: Sequence[str], length: int = _LONGEST) -> list[str]:
    """Short names, as long as it takes for them to stay distinct."""
    while True:
        found = [short(name, length) for name in names]
        if len(set(found)) == len(set(names)):
            return found
        length += 2
