"""A user's mistake on nnU-Net's command line is one line and exit code 2; a fault keeps its traceback."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from nnunetv2_lightnets.discovery.command_line import user_mistake
from nnunetv2_lightnets.errors import LightNetsError


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LightNetsError("the thing, its value and\nthe remedy"), "the thing, its value and the remedy"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/p/nnUNetPlans.json"), "nnUNetv2_plan_and_preprocess"),
        (PermissionError(errno.EACCES, "Permission denied", "/results"), "/results: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("Could not find a dataset with the ID 7. Make sure the requested"), "with the ID 7. Looked in"),
        (RuntimeError("nnUNet_results is not defined. nnU-Net cannot"), "nnUNet_results is not defined"),
        (KeyboardInterrupt(), "--c"),
    ],
)
def test_mistakes_have_one_line(error: BaseException, words: str) -> None:
    line = user_mistake(error)
    assert line is not None
    assert words in line
    assert "\n" not in line


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ValueError("bad"), KeyError("x"), AssertionError()])
def test_faults_are_no_mistakes(error: BaseException) -> None:
    assert user_mistake(error) is None


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
