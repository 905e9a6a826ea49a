"""What Python runs when it starts: tell nnU-Net where our trainers are.

nnU-Net searches the folders in ``nnUNet_extTrainer``. :func:`announce` appends ours, so that no user has to
export anything. It must cost nothing (no torch, no nnU-Net), keep what the user set, and never fail.
"""

import os
import sys

VARIABLE = "nnUNet_extTrainer"
DISABLE = "NNUNET_LIGHTNETS_DISABLE"
SHIM_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shim")


def announce() -> None:
    """Append the shim's folder to ``nnUNet_extTrainer`` of this process, once, unless the user switched us off."""
    if os.environ.get(DISABLE, "").strip().lower() not in ("", "0", "false", "no"):
        return
    folders = [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder.strip()]
    if SHIM_FOLDER not in folders:
        os.environ[VARIABLE] = os.pathsep.join([*folders, SHIM_FOLDER])
    if is_nnunet_command():
        from nnunetv2_lightnets.discovery.command_line import report_errors_if_ours

        report_errors_if_ours()


def is_nnunet_command() -> bool:
    """Whether this process was started as one of nnU-Net's commands (``nnUNetv2_train``, ``nnUNetv2_predict``, ...)."""
    program = os.path.basename(sys.argv[0] if sys.argv else "")
    return program.startswith("nnUNetv2_") and not program.startswith("nnUNetv2_lightnets")
