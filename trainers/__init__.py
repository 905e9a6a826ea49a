"""The recipes: one short file per paper, found by the trainer's name.

``nnunetv2_lightnets.trainers.<name>`` is the trainer class; nothing is imported before it is asked for, so a
missing optional dependency hurts only its own trainer. Names take suffixes that set a budget:
``nnUNetTrainerLightMUNet_50epochs``, ``nnUNetTrainerLightMUNet_2epochs_10iters``.
"""

from __future__ import annotations

import difflib
import importlib
import re
from typing import Any

# Trainer -> file in this folder.
TRAINERS = {
    "nnUNetTrainerLightMUNet": "lightm_unet",
    "nnUNetTrainerLightMUNetS": "lightm_unet",
    "nnUNetTrainerLightMUNetT": "lightm_unet",
    "nnUNetTrainerLightMUNetDemo": "lightm_unet",
    "nnUNetTrainerLightMUNetNoScan": "lightm_unet",
    "nnUNetTrainerLightMUNetSNoScan": "lightm_unet",
    "nnUNetTrainerLightMUNetTNoScan": "lightm_unet",
    "nnUNetTrainerULite": "ulite",
    "nnUNetTrainerUltraLightUNet": "ultralight_unet",
    "nnUNetTrainerUltraLightUNetT": "ultralight_unet",
    "nnUNetTrainerUltraLightUNetS": "ultralight_unet",
    "nnUNetTrainerUltraLightUNetM": "ultralight_unet",
    "nnUNetTrainerUltraLightUNetL": "ultralight_unet",
    "nnUNetTrainerUltraLightUNetSingleKernel": "ultralight_unet",
    "nnUNetTrainerSwinUMamba": "swin_umamba",
    "nnUNetTrainerSwinUMambaScratch": "swin_umamba",
    "nnUNetTrainerSwinUMambaScratchNoScan": "swin_umamba",
    "nnUNetTrainerSwinUMambaD": "swin_umamba",
    "nnUNetTrainerSwinUMambaDScratch": "swin_umamba",
    "nnUNetTrainerUMambaBot": "umamba",
    "nnUNetTrainerUMambaEnc": "umamba",
    "nnUNetTrainerSegResNet": "monai_baselines",
    "nnUNetTrainerUNETR": "monai_baselines",
    "nnUNetTrainerSwinUNETR": "monai_baselines",
    "nnUNetTrainerSlimUNet": "slim_unet",
    "nnUNetTrainerSlimUNetLightMUNet": "slim_unet",
    "nnUNetTrainerSlimUNetLightMUNetT": "slim_unet",
    "nnUNetTrainerSlimUNetULite": "slim_unet",
    "nnUNetTrainerSlimUNetUltraLightUNet": "slim_unet",
}

_BUDGET = re.compile(r"_([1-9]\d*)(epochs|iters)")
_NAME = re.compile(rf"(?P<base>nnUNetTrainer[A-Za-z0-9]*?)(?P<budget>(?:{_BUDGET.pattern})+)$")


def trainer_names() -> list[str]:
    """Names of all trainers for data of one's own, without suffixes."""
    return [name for name in TRAINERS if not name.endswith("Demo")]


def nearest_trainers(name: str) -> list[str]:
    """Up to three trainer names that resemble ``name``, whose suffixes are kept where they are well formed."""
    match = re.match(r"(nnUNetTrainer[A-Za-z0-9]*)(.*)$", name)
    base, suffix = match.groups() if match else (name, "")
    if suffix and not re.fullmatch(rf"(?:{_BUDGET.pattern})+", suffix):
        suffix = ""
    # "nnUNetTrainer" itself is common to all names and says nothing about likeness.
    short = {key.removeprefix("nnUNetTrainer").lower(): key for key in TRAINERS}
    found = difflib.get_close_matches(base.removeprefix("nnUNetTrainer").lower(), short, n=3, cutoff=0.5)
    return [short[key] + suffix for key in found]


def find_trainer(name: str) -> type[Any] | None:
    """The trainer class called ``name``, suffixes included, or None if there is none.

    The suffixes also work on nnU-Net's own ``nnUNetTrainer``, so that a comparison can give it the same budget.
    """
    if name in globals():  # a budgeted class made before: a name is one class
        found: type[Any] = globals()[name]
        return found
    if name in TRAINERS:
        module = importlib.import_module(f"{__name__}.{TRAINERS[name]}")
        trainer: type[Any] = getattr(module, name)
        return trainer
    match = _NAME.match(name)
    if match is None or not (match["base"] in TRAINERS or match["base"] == "nnUNetTrainer"):
        return None
    budget = {unit: int(number) for number, unit in _BUDGET.findall(match["budget"])}
    if len(budget) < len(_BUDGET.findall(match["budget"])):
        return None  # the same unit twice
    from nnunetv2_lightnets.training import with_budget

    if match["base"] == "nnUNetTrainer":
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as base
    else:
        base = find_trainer(match["base"])
    budgeted = with_budget(base, name, epochs=budget.get("epochs"), iterations=budget.get("iters"))
    budgeted.__module__, budgeted.__qualname__ = __name__, name  # where pickle finds it
    globals()[name] = budgeted
    return budgeted


def __getattr__(name: str) -> Any:
    trainer = find_trainer(name) if name.startswith("nnUNetTrainer") else None
    if trainer is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return trainer
