"""What happens when nnU-Net's search reaches our folder."""

from __future__ import annotations

import os
import sys
from typing import Any

from nnunetv2_lightnets.discovery.command_line import is_nnunet_command, report_errors_in_one_line
from nnunetv2_lightnets.discovery.start_up import SHIM_FOLDER, VARIABLE
from nnunetv2_lightnets.trainers import find_trainer, nearest_trainers


def trainer_or_attribute_error(name: str) -> Any:
    """The trainer class called ``name``; the module-level ``__getattr__`` of the shim.

    Raises:
        AttributeError: if the name is not ours, so that nnU-Net goes on searching.
        SystemExit: with code 2, on nnU-Net's command line, if the name is not ours, resembles one of ours, and no
            other folder is left to search: one line with the nearest names then helps more than a traceback.
    """
    if not name.startswith("nnUNetTrainer"):
        raise AttributeError(name)  # what Python asks of any module: __path__, __spec__, ...
    name_missing_folders()
    trainer = find_trainer(name)
    if trainer is not None:
        report_errors_in_one_line()
        return trainer
    nearest = nearest_trainers(name)
    if nearest and is_nnunet_command() and _searched_last():
        print(f"Error: there is no trainer {name}; did you mean {', '.join(nearest)}?", file=sys.stderr)
        raise SystemExit(2)
    raise AttributeError(f"nnunetv2_lightnets has no trainer {name}; the nearest are: {', '.join(nearest)}")


def _folders() -> list[str]:
    return [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder.strip()]


def _searched_last() -> bool:
    """Whether no existing folder comes after ours in nnU-Net's search."""
    folders = _folders()
    if SHIM_FOLDER not in folders:
        return True
    return not any(os.path.isdir(folder) for folder in folders[folders.index(SHIM_FOLDER) + 1 :])


def name_missing_folders() -> None:
    """Say which of the user's own folders do not exist: nnU-Net skips them in silence."""
    for folder in _folders():
        if not os.path.isdir(folder):
            print(f"WARNING: {VARIABLE} names a folder that does not exist: {folder}", file=sys.stderr)
