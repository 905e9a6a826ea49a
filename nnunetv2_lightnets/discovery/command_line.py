"""A user's mistake on nnU-Net's command line gets one line and exit code 2, not a traceback."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from nnunetv2_lightnets.errors import LightNetsError

_FULL_TRACEBACK = "NNUNET_LIGHTNETS_TRACEBACK"
_DATA_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def is_nnunet_command() -> bool:
    """Whether this process was started as one of nnU-Net's commands (``nnUNetv2_train``, ``nnUNetv2_predict``, ...)."""
    return os.path.basename(sys.argv[0] if sys.argv else "").startswith("nnUNetv2_")


def user_mistake(error: BaseException) -> str | None:
    """One line that tells the user what is wrong, or None if the error is no mistake of theirs."""
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted. A training goes on from its last checkpoint with --c."
    if isinstance(error, LightNetsError):
        mistake: str | None = str(error)
    elif isinstance(error, OSError):
        mistake = _disk_mistake(error)
    elif isinstance(error, RuntimeError | ValueError):
        mistake = _nnunet_mistake(" ".join(str(error).split()))
    else:
        mistake = None
    return None if mistake is None else f"Error: {' '.join(mistake.split())}"


def _disk_mistake(error: OSError) -> str | None:
    if error.errno is None:
        return None
    if error.filename is None:
        return f"{error.strerror}; check the disk that holds nnUNet_results"
    if isinstance(error, FileNotFoundError):
        remedy = (
            ": run nnUNetv2_plan_and_preprocess first, and check -p" if str(error.filename).endswith("json") else ""
        )
        return f"{error.filename} does not exist{remedy}"
    return f"{error.filename}: {error.strerror}; check that the folder exists and can be written"


def _nnunet_mistake(text: str) -> str | None:
    """nnU-Net's own words for a mistake, as far as they help; None for its other errors."""
    if text.startswith("Could not find a dataset with the ID"):
        folders = ", ".join(f"{key}={os.environ.get(key)}" for key in _DATA_FOLDERS)
        return f"{text.split('Make sure')[0].strip()} Looked in {folders}"
    mistakes = (
        "More than one dataset name found",
        "dataset_name_or_id",
        "Cannot run validation because",
        "Cannot both continue",
        *(f"{folder} is not defined" for folder in _DATA_FOLDERS),
    )
    return text if text.startswith(mistakes) else None


def report_errors_in_one_line() -> None:
    """From now on, end nnU-Net's command with one line and exit code 2 when the user made a mistake.

    Any other error keeps its traceback. ``NNUNET_LIGHTNETS_TRACEBACK=1`` keeps all of them. Does nothing outside
    nnU-Net's commands, so that programs which use nnU-Net as a library are left alone.
    """
    if not is_nnunet_command() or os.environ.get(_FULL_TRACEBACK) or sys.excepthook is _one_line:
        return
    global _previous
    _previous = sys.excepthook
    sys.excepthook = _one_line


_previous = sys.excepthook


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    mistake = user_mistake(error)
    if mistake is None:
        _previous(kind, error, trace)
        return
    sys.stdout.flush()
    print(mistake, file=sys.stderr)
    # Python ends with the exit code of a SystemExit that an excepthook raises.
    raise SystemExit(2)
