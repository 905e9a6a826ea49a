"""A user's mistake on nnU-Net's command line gets one line and exit code 2, not a traceback."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from nnunetv2_lightnets.errors import LightNetsError

_FULL_TRACEBACK = "NNUNET_LIGHTNETS_TRACEBACK"


def is_nnunet_command() -> bool:
    """Whether this process was started as one of nnU-Net's commands (``nnUNetv2_train``, ``nnUNetv2_predict``, ...)."""
    return os.path.basename(sys.argv[0] if sys.argv else "").startswith("nnUNetv2_")


def user_mistake(error: BaseException) -> str | None:
    """One line that tells the user what is wrong, or None if the error is no mistake of theirs."""
    text = " ".join(str(error).split())
    if isinstance(error, LightNetsError):
        return text
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        file = str(error.filename)
        if file.endswith(("dataset.json", ".json")):
            return f"{file} does not exist: run nnUNetv2_plan_and_preprocess for this data set first, and check -p"
        return f"{file} does not exist"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check that the folder exists and can be written"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror} (errno {error.errno}); check the disk that holds nnUNet_results"
    if isinstance(error, RuntimeError | ValueError):
        # nnU-Net's own words for a mistake; what follows them is kept where it helps.
        if text.startswith("Could not find a dataset with the ID"):
            data_set = text.split("Make sure")[0].strip()
            folders = {key: os.environ.get(key) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
            return f"{data_set} Looked in {', '.join(f'{key}={value}' for key, value in folders.items())}"
        mistakes = (
            "More than one dataset name found",
            "dataset_name_or_id",
            "The configuration",
            "Requested configuration",
            "Cannot run validation because",
            "Cannot both continue",
            "nnUNet_",
        )
        if text.startswith(mistakes):
            return text
    return None


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
    print(f"Error: {mistake}", file=sys.stderr)
    # Python ends with the exit code of a SystemExit that an excepthook raises.
    raise SystemExit(2)
