"""What Python runs when it starts: tell nnU-Net where our trainers are, and torch how to wait and where to put tensors.

nnU-Net searches the folders in ``nnUNet_extTrainer``. :func:`announce` appends ours, so that no user has to
export anything. It must cost nothing (no torch, no nnU-Net), keep what the user set, and never fail.
"""

import os

from nnunetv2_lightnets.discovery.environment import (
    DISABLE,
    SHIM_FOLDER,
    VARIABLE,
    external_folders,
    is_command,
    is_nnunet_command,
)


def announce() -> None:
    """Append the shim's folder to ``nnUNet_extTrainer`` of this process, once, unless the user switched us off."""
    if os.environ.get(DISABLE, "").strip().lower() not in ("", "0", "false", "no"):
        return
    folders = external_folders()
    if SHIM_FOLDER not in folders:
        os.environ[VARIABLE] = os.pathsep.join([*folders, SHIM_FOLDER])
    if is_command():
        from nnunetv2_lightnets.discovery.huge_pages import use_huge_pages
        from nnunetv2_lightnets.discovery.waiting import shorten_waiting

        shorten_waiting()
        use_huge_pages()
    if is_nnunet_command():
        from nnunetv2_lightnets.discovery.command_line import report_errors_if_ours

        report_errors_if_ours()
