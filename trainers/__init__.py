"""The recipes: one short file per paper, found by the trainer's name.

``nnunetv2_lightnets.trainers.<name>`` is the trainer class; nothing is imported before it is asked for, so a
missing optional dependency hurts only its own trainer. Names take suffixes that set a budget:
``nnUNetTrainerLightMUNet_50epochs``, ``nnUNetTrainerLightMUNet_2epochs_10iters``.
"""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

from nnunetv2_lightnets.nnunet.trainer_names import BUDGET, TRAINERS

_NAME = re.compile(rf"(?P<base>nnUNetTrainer[A-Za-z0-9]*?)(?P<budget>(?:{BUDGET.pattern})+)$")


@functools.cache  # a name is one class, as nnU-Net's results and pickle ask for
def find_trainer(name: str) -> type[Any] | None:
    """The trainer class called ``name``, suffixes included, or None if there is none.

    The suffixes also work on nnU-Net's own ``nnUNetTrainer``, so that a comparison can give it the same budget.
    """
    if name in TRAINERS:
        trainer: type[Any] = getattr(importlib.import_module(f"{__name__}.{TRAINERS[name]}"), name)
        return trainer
    match = _NAME.match(name)
    if match is None or not (match["base"] in TRAINERS or match["base"] == "nnUNetTrainer"):
        return None
    numbers = BUDGET.findall(match["budget"])
    budget = {unit: int(number) for number, unit in numbers}
    if len(budget) < len(numbers):
        return None  # the same unit twice
    from nnunetv2_lightnets.nnunet.trainer import with_budget

    if match["base"] == "nnUNetTrainer":
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as base
    else:
        base = find_trainer(match["base"])
    budgeted = with_budget(base, name, epochs=budget.get("epochs"), iterations=budget.get("iters"))
    budgeted.__module__, budgeted.__qualname__ = __name__, name  # pickle finds it through __getattr__
    return budgeted


def __getattr__(name: str) -> Any:
    trainer = find_trainer(name)
    if trainer is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return trainer
