"""A user's mistake on nnU-Net's command line is one line and exit code 2; a fault keeps its traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnunetv2_lightnets.discovery.command_line import user_mistake
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.nnunet.folders import dataset_folder

MODEL = "Dataset001_X/nnUNetTrainerLightMUNet_5epochs__nnUNetPlans__2d"
MISSPELT_MODEL = "Dataset001_X/nnUNetTrainerLightMUnet__nnUNetPlans__2d"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LightNetsError("the thing, its value and\nthe remedy"), "the thing, its value and the remedy"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/pre/D/nnUNetPlans.json"), "nnUNetv2_plan_and_preprocess"),
        (FileNotFoundError(errno.ENOENT, "No such file", f"/res/{MODEL}/dataset.json"), "no such model was trained"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", f"/res/{MISSPELT_MODEL}/dataset.json"),
            "did you mean nnUNetTrainerLightMUNet",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", f"/res/{MODEL}/fold_1/checkpoint_final.pth"), "--c"),
        (PermissionError(errno.EACCES, "Permission denied", "/results"), "/results: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("Could not find a dataset with the ID 7. Make sure the requested"), "with the ID 7. Looked in"),
        (RuntimeError("nnUNet_results is not defined. nnU-Net cannot"), "nnUNet_results is not defined"),
        (RuntimeError("Could not find requested nnunet trainer nnUNetTrainerULight in"), "mean nnUNetTrainerULite"),
        (RuntimeError("Could not find requested nnunet trainer nnUNetTrainerXYZ in"), "nnUNetv2_lightnets networks"),
        (RuntimeError("Found no NVIDIA driver on your system. Please check"), "-device cpu"),
        (AssertionError("Torch not compiled with CUDA enabled"), "-device cpu"),
        (AssertionError("Cannot set --c and --val flag at the same time. Dummy."), "--c and --val"),
        (AssertionError("Key a.b is missing in the pretrained model. Not compatible with your network."), "Key a.b"),
        (ValueError("invalid literal for int() with base 10: 'x'"), "a number or 'all', not 'x'"),
        (KeyboardInterrupt(), "--c"),
        (OSError(errno.ENOSPC, "No space left on device"), "check the disk that holds nnUNet_results"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/fold_0"), "/fold_0: Is a directory; check that this path"),
    ],
)
def test_mistakes_have_one_line(error: BaseException, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", "/pre")
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "7", "2d", "x", "-tr", "nnUNetTrainerULite"])
    line = user_mistake(error)
    assert line is not None
    assert words in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_a_worker_that_died_is_no_fault_of_the_disk(error: OSError) -> None:
    line = user_mistake(error)
    assert line is not None
    assert f"{error.strerror}: a worker process died" in line and "lack of memory" in line
    assert all(remedy in line for remedy in ("nnUNet_n_proc_DA", "-npp", "-nps"))
    assert "disk" not in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error"),
        OSError(errno.EINVAL, "Invalid argument"),
        OSError("words alone"),
        ValueError("bad"),
        ValueError("invalid literal for int() with base 10: 'read from some file'"),
        KeyError("x"),
        AssertionError(),
    ],
)
def test_faults_are_no_mistakes(error: BaseException) -> None:
    assert user_mistake(error) is None


@pytest.mark.slow
def test_a_mistake_found_by_one_of_several_processes_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As nnU-Net trains on several GPUs."""
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    with pytest.raises(Exception, match="Traceback") as caught:
        torch.multiprocessing.spawn(dataset_folder, nprocs=1)
    expected = "Error: nnUNet_preprocessed is not set to a folder, so -d 0 cannot be found; set it"
    assert user_mistake(caught.value) == expected
    with pytest.raises(Exception, match="Traceback") as caught:
        torch.multiprocessing.spawn(divmod, args=(0,), nprocs=1)
    assert user_mistake(caught.value) is None


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 the start of one"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (file := tmp_path / "checkpoint_final.pth").write_bytes(content)
    with pytest.raises(Exception) as caught:
        torch.load(file, weights_only=False)
    line = user_mistake(caught.value)
    assert line is not None
    assert f"{file} cannot be read" in line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("Attempting to deserialize object on a CUDA device but torch.cuda.is_available() is False."),
    ],
)
def test_a_good_checkpoint_is_not_called_damaged(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    torch.save({}, file := tmp_path / "checkpoint_final.pth")
    monkeypatch.setattr(torch.serialization, "_load", fail)
    with pytest.raises(RuntimeError) as caught:
        torch.load(file, weights_only=False)
    assert user_mistake(caught.value) is None


PROGRAM = """
import sys
sys.argv = [{program!r}]
from nnunetv2_lightnets.discovery.command_line import report_errors_in_one_line
from nnunetv2_lightnets.errors import LightNetsError
report_errors_in_one_line()
raise {error}
"""


def outcome(program: str, error: str) -> subprocess.CompletedProcess[str]:
    code = PROGRAM.format(program=program, error=error)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("error", ["LightNetsError('say this')", "KeyboardInterrupt()"])
def test_nnunets_command_ends_with_one_line_and_code_2(error: str) -> None:
    done = outcome("/usr/bin/nnUNetv2_train", error)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: " if "LightNets" in error else "Interrupted")
    assert done.stderr.count("\n") == 1


def test_a_fault_keeps_its_traceback() -> None:
    done = outcome("/usr/bin/nnUNetv2_train", "ZeroDivisionError('why')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_other_programs_are_left_alone() -> None:
    done = outcome("my_program.py", "LightNetsError('say this')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def command(folder: Path, code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of nnU-Net's that comes to ``code`` before it looks for a trainer, as nnUNetv2_predict may."""
    (script := folder / "nnUNetv2_predict").write_text(code)
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


RAISE = "raise FileNotFoundError(2, 'No such file', '/some/file')"


@pytest.mark.parametrize("trainer", ["nnUNetTrainerLightMUNet", "nnUNetTrainerLightMUNetT_2epochs", "LightMUnet"])
def test_a_command_that_names_our_trainer_reports_in_one_line_from_the_start(tmp_path: Path, trainer: str) -> None:
    done = command(tmp_path, RAISE, "-d", "7", "-tr", trainer)
    assert (done.returncode, done.stderr) == (2, "Error: /some/file does not exist\n")


@pytest.mark.parametrize("arguments", [("-d", "7"), ("-tr", "nnUNetTrainer_5epochs"), ("-tr",)])
def test_other_trainers_keep_nnunets_own_reports(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = command(tmp_path, RAISE, *arguments)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_the_traceback_can_be_asked_for(tmp_path: Path) -> None:
    done = command(tmp_path, RAISE, "-tr", "nnUNetTrainerLightMUNet", NNUNET_LIGHTNETS_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_broken_module_in_a_folder_of_the_user_is_named_below_its_traceback(tmp_path: Path) -> None:
    (theirs := tmp_path / "their folder").mkdir()
    (theirs / "broken.py").write_text("raise RuntimeError('my own mistake')")
    code = "import os, sys; sys.path.insert(0, os.environ['nnUNet_extTrainer'].split(os.pathsep)[0]); import broken"
    done = command(tmp_path, code, "-tr", "nnUNetTrainerLightMUNet", nnUNet_extTrainer=str(theirs))
    assert done.returncode == 1
    assert "my own mistake" in done.stderr
    assert f"comes from {theirs / 'broken.py'}: nnUNet_extTrainer names its folder" in done.stderr.splitlines()[-1]
