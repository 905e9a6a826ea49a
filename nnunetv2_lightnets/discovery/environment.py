"""What tells nnU-Net of us, and whether this process is one of its commands. Imports nothing heavy."""

import os
import sys

VARIABLE = "nnUNet_extTrainer"
DISABLE = "NNUNET_LIGHTNETS_DISABLE"
SHIM_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shim")


def external_folders() -> list[str]:
    """The folders that nnU-Net is told to search, ours included."""
    return [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder.strip()]


def is_command() -> bool:
    """Whether this process was started as a command of nnU-Net's (``nnUNetv2_train``, ...) or as our own."""
    return _program().startswith("nnUNetv2_")


def is_nnunet_command() -> bool:
    """Whether it was started as one of nnU-Net's."""
    return is_command() and not _program().startswith("nnUNetv2_lightnets")


def _program() -> str:
    return os.path.basename(sys.argv[0] if sys.argv else "")
