"""The start-up file: cheap, idempotent, keeps what the user has set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nnunetv2_lightnets.discovery.environment import DISABLE, SHIM_FOLDER, VARIABLE
from nnunetv2_lightnets.discovery.start_up import announce


def run(code: str, *arguments: str, **environment: str | None) -> str:
    env = {**os.environ, **{key: value for key, value in environment.items() if value is not None}}
    for key, value in environment.items():
        if value is None:
            env.pop(key, None)
    done = subprocess.run([sys.executable, *arguments, "-c", code], env=env, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PRINT = f"import os; print(os.environ.get('{VARIABLE}'))"


def test_a_new_process_knows_our_folder_without_export() -> None:
    assert run(PRINT, **{VARIABLE: None}) == SHIM_FOLDER


def test_the_users_folders_stay_and_come_first() -> None:
    assert run(PRINT, **{VARIABLE: "/some/folder:/another one"}) == f"/some/folder:/another one:{SHIM_FOLDER}"


def test_a_child_process_adds_nothing() -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PRINT!r}], check=True)"
    assert run(child, **{VARIABLE: None}) == SHIM_FOLDER


@pytest.mark.parametrize(("value", "known"), [("1", False), ("true", False), ("0", True), ("", True)])
def test_it_can_be_switched_off(value: str, known: bool) -> None:
    assert (run(PRINT, **{VARIABLE: None, DISABLE: value}) == SHIM_FOLDER) is known


def test_it_works_in_isolated_mode() -> None:
    assert run(PRINT, "-I", **{VARIABLE: None}) == SHIM_FOLDER


def test_starting_python_imports_neither_torch_nor_nnunet() -> None:
    code = "import sys; print([m for m in ('torch', 'nnunetv2', 'numpy', 'triton') if m in sys.modules])"
    assert run(code) == "[]"


def test_importing_the_package_imports_neither_torch_nor_nnunet() -> None:
    code = (
        "import sys, nnunetv2_lightnets, nnunetv2_lightnets.trainers, nnunetv2_lightnets.cli;"
        "nnunetv2_lightnets.cli.build_parser('demo');"
        "print([m for m in ('torch', 'nnunetv2', 'numpy', 'triton') if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_announce_twice_is_announce_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/theirs")
    monkeypatch.delenv(DISABLE, raising=False)
    announce()
    announce()
    assert os.environ[VARIABLE] == f"/theirs{os.pathsep}{SHIM_FOLDER}"
