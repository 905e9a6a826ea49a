"""What happens when nnU-Net's search reaches our folder."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from nnunetv2_lightnets.discovery.command_line import report_errors_in_one_line, trainer_argument
from nnunetv2_lightnets.discovery.environment import SHIM_FOLDER, VARIABLE, external_folders
from nnunetv2_lightnets.trainers import find_trainer


def trainer_or_attribute_error(name: str) -> Any:
    """The trainer class called ``name``; the module-level ``__getattr__`` of the shim.

    Raises:
        AttributeError: if the name is not ours, so that nnU-Net goes on searching.
    """
    if not name.startswith("nnUNetTrainer") and name != trainer_argument():
        raise AttributeError(name)  # what Python asks of any module: __path__, __spec__, ...
    for folder in external_folders():
        if not os.path.isdir(folder):
            _name_missing_folder(folder)
    trainer = find_trainer(name)
    if trainer is not None or _searched_last():
        report_errors_in_one_line()
    if trainer is None:
        raise AttributeError(f"nnunetv2_lightnets has no trainer {name}")
    return trainer


def _searched_last() -> bool:
    """Whether no existing folder comes after ours in nnU-Net's search."""
    folders = external_folders()
    if SHIM_FOLDER not in folders:
        return True
    return not any(os.path.isdir(folder) for folder in folders[folders.index(SHIM_FOLDER) + 1 :])


@functools.cache  # once in a process: nnU-Net asks for each trainer twice
def _name_missing_folder(folder: str) -> None:
    """Say that a folder of the user's own does not exist: nnU-Net skips it in silence."""
    print(f"WARNING: {VARIABLE} names a folder that does not exist: {folder}", file=sys.stderr)
