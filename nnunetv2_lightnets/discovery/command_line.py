"""A user's mistake on nnU-Net's command line gets one line and exit code 2, not a traceback."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from types import TracebackType

from nnunetv2_lightnets.discovery.environment import SHIM_FOLDER, VARIABLE, external_folders, is_nnunet_command
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import is_damaged, last_line
from nnunetv2_lightnets.nnunet.folders import FOLDERS, PREPROCESSED, RESULTS
from nnunetv2_lightnets.nnunet.trainer_names import nearest_trainers

_FULL_TRACEBACK = "NNUNET_LIGHTNETS_TRACEBACK"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_WORKER = (errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOMEM)  # pipes to and from processes
# How nnU-Net's own words for a mistake begin, where they help as they are.
_CLEAR_WORDS = (
    "Cannot both continue",
    "Cannot run validation because",
    "Cannot set --c and --val",
    "dataset_name_or_id",
    "More than one dataset name found",
    "-device must be",
    *(f"{folder} is not defined" for folder in FOLDERS),
)
_NO_CUDA = ("Found no NVIDIA driver", "Torch not compiled with CUDA", "No CUDA GPUs are available")


def user_mistake(error: BaseException) -> str | None:
    """One line that tells the user what is wrong, or None if the error is no mistake of theirs."""
    mistake: str | None = None
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted. A training goes on from its last checkpoint with --c."
    if isinstance(error, LightNetsError):
        mistake = str(error)
    elif type(error).__name__ == "ProcessRaisedException":  # on several GPUs: the text is a process's own traceback
        _, ours, words = last_line(error).partition(f"{LightNetsError.__module__}.LightNetsError: ")
        mistake = words if ours else None
    elif isinstance(error, OSError):
        mistake = _system_mistake(error)
    elif is_damaged(error):
        mistake = _damaged_checkpoint(error)
    elif isinstance(error, RuntimeError | ValueError | AssertionError):
        mistake = _nnunet_mistake(" ".join(str(error).split()))
    return None if mistake is None else f"Error: {' '.join(mistake.split())}"


def _system_mistake(error: OSError) -> str | None:
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        file = str(error.filename)
        return f"{file} does not exist{_missing_file_remedy(file)}"
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}; check that this path is right and may be used"
    if error.errno in _DISK:
        return f"{error.strerror}; check the disk that holds {RESULTS}"
    if error.errno in _WORKER:
        return (
            f"{error.strerror}: a worker process died or could not start, usually for lack of memory. Take fewer "
            f"workers (export nnUNet_n_proc_DA=2 for training, -npp 1 -nps 1 for prediction), or give more memory"
        )
    return None


def _missing_file_remedy(file: str) -> str:
    """What to do about a missing file of nnU-Net's, by its place."""
    folder, name = os.path.split(file)
    preprocessed = os.environ.get(PREPROCESSED)
    if name.startswith("checkpoint_"):
        return ": this fold's training has not finished; go on with --c, or name another checkpoint with -chk"
    if preprocessed and file.startswith(preprocessed):
        return ": run nnUNetv2_plan_and_preprocess first, and check -p"
    if os.path.basename(folder).count("__") == 2:  # TRAINER__PLANS__CONFIGURATION
        trainer = os.path.basename(folder).split("__")[0]
        nearest = nearest_trainers(trainer)
        meant = f"; did you mean {', '.join(nearest)}?" if nearest and trainer not in nearest else ""
        return f": no such model was trained; check -d, -tr, -c and -p{meant}"
    return ""


def _damaged_checkpoint(error: BaseException) -> str | None:
    """Name the file; the error does not, but the call of ``torch.load`` that it comes out of does."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if code.co_name == "load" and code.co_filename.endswith(os.path.join("torch", "serialization.py")):
            return (
                f"{frame.f_locals.get('f')} cannot be read: it is truncated or damaged, or no checkpoint; get it again"
            )
    return None


def _nnunet_mistake(text: str) -> str | None:
    """Mistakes that nnU-Net or torch report in words; None for their other errors."""
    if text.startswith("Could not find a dataset with the ID"):
        folders = ", ".join(f"{key}={os.environ.get(key)}" for key in FOLDERS)
        return f"{text.split('Make sure')[0].strip()} Looked in {folders}"
    if missing := re.match(r"Could not find requested nnunet trainer (\S+)", text):
        nearest = ", ".join(nearest_trainers(missing[1]))
        remedy = f"did you mean {nearest}?" if nearest else "nnUNetv2_lightnets networks lists those that are here"
        return f"there is no trainer {missing[1]}, neither in nnU-Net nor in {VARIABLE}; {remedy}"
    fold = re.match(r"invalid literal for int\(\) with base 10: '(.*)'$", text)
    if fold and fold[1] in sys.argv:  # typed, not read from a file; the fold is the only number that nnU-Net converts
        return f"the fold is a number or 'all', not {fold[1]!r}"
    if text.startswith(_NO_CUDA):
        return f"{text.split('.')[0]}; to compute on the CPU add -device cpu"
    if "pretrained model" in text and "compatible with your network" in text:  # holds all numbers of a tensor
        return f"-pretrained_weights: {text.split(';')[0]}; take a checkpoint of the same trainer and configuration"
    return text if text.startswith(_CLEAR_WORDS) else None


def report_errors_if_ours() -> None:
    """Report mistakes in one line if the command names (``-tr``) one of our trainers, or nearly so."""
    name = trainer_argument()
    if name is not None and nearest_trainers(name):
        report_errors_in_one_line()


def trainer_argument() -> str | None:
    """What this command was given as ``-tr``, or None."""
    for argument, following in zip(sys.argv, [*sys.argv[1:], None], strict=True):
        if argument == "-tr":
            return following
        if argument.startswith("-tr="):
            return argument.removeprefix("-tr=")
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
        if file := _users_own_module(trace):
            print(f"The error comes from {file}: {VARIABLE} names its folder, which nnU-Net searches.", file=sys.stderr)
        return
    sys.stdout.flush()
    print(mistake, file=sys.stderr)
    # Python ends with the exit code of a SystemExit that an excepthook raises.
    raise SystemExit(2)


def _users_own_module(trace: TracebackType | None) -> str | None:
    """The file in a folder of ``nnUNet_extTrainer``, other than ours, through which an error went."""
    folders = map(os.path.abspath, external_folders())
    own = tuple(os.path.join(folder, "") for folder in folders if folder != SHIM_FOLDER)
    files = (os.path.abspath(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(trace))
    return next((file for file in files if file.startswith(own)), None)
