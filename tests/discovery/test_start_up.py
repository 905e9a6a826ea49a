"""The start-up file: cheap, idempotent, keeps what the user has set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_lightnets.discovery import huge_pages
from nnunetv2_lightnets.discovery.environment import DISABLE, SHIM_FOLDER, VARIABLE
from nnunetv2_lightnets.discovery.start_up import announce
from nnunetv2_lightnets.discovery.waiting import SETTINGS, SWITCH, VARIABLES, waiting


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


def set_in(
    program: str, tmp_path: Path, names: tuple[str, ...] = VARIABLES, **environment: str | None
) -> dict[str, str]:
    """Which of torch's variables, those of waiting threads if none are named, a program of this name finds set."""
    file = tmp_path / program
    file.write_text(f"import os; print(*(f'{{n}}={{os.environ[n]}}' for n in {names} if n in os.environ))")
    env = {k: v for k, v in os.environ.items() if k not in (*names, SWITCH, DISABLE)}
    env |= {key: value for key, value in environment.items() if value is not None}
    done = subprocess.run([sys.executable, str(file)], env=env, capture_output=True, text=True, check=True)
    return dict(word.split("=") for word in done.stdout.split())


@pytest.mark.skipif(sys.platform != "linux", reason="set on Linux alone")
@pytest.mark.parametrize("program", ["nnUNetv2_train", "nnUNetv2_predict", "nnUNetv2_lightnets"])
def test_threads_of_commands_do_not_wait_long(program: str, tmp_path: Path) -> None:
    """Those that they start inherit it: nnU-Net's workers, and processes that measure."""
    assert set_in(program, tmp_path) == SETTINGS


def test_other_programs_are_left_alone(tmp_path: Path) -> None:
    assert set_in("my_script.py", tmp_path) == {}


@pytest.mark.parametrize("variable", VARIABLES)
def test_waiting_that_the_user_has_set_stays(variable: str, tmp_path: Path) -> None:
    assert set_in("nnUNetv2_train", tmp_path, **{variable: "7"}) == {variable: "7"}


@pytest.mark.parametrize("off", [{SWITCH: "off"}, {DISABLE: "1"}])
def test_waiting_can_be_left_as_torch_has_it(off: dict[str, str], tmp_path: Path) -> None:
    assert set_in("nnUNetv2_train", tmp_path, **off) == {}


@pytest.mark.skipif(not os.path.isdir("/sys/kernel/mm/transparent_hugepage"), reason="this kernel has none")
def test_commands_put_large_tensors_into_huge_pages(tmp_path: Path) -> None:
    names = (huge_pages.VARIABLE,)
    assert set_in("nnUNetv2_train", tmp_path, names) == {huge_pages.VARIABLE: "1"}
    assert set_in("nnUNetv2_train", tmp_path, names, **{huge_pages.VARIABLE: "0"}) == {huge_pages.VARIABLE: "0"}
    assert set_in("nnUNetv2_train", tmp_path, names, **{DISABLE: "1"}) == {}
    assert set_in("my_script.py", tmp_path, names) == {}


@pytest.mark.skipif(not os.path.isdir("/sys/kernel/mm/transparent_hugepage"), reason="this kernel has none")
def test_torch_asks_the_kernel_for_huge_pages() -> None:
    """As the kernel shows of the memory that a tensor is in; whether there are any just then is the kernel's affair."""
    code = (
        "import torch; x = torch.ones(8 << 20); place = x.data_ptr() + (4 << 20); lines = open('/proc/self/smaps')\n"
        "for line in lines:\n"
        "    if '-' in line.split()[0] and line.split()[0] != 'VmFlags:':\n"
        "        first, end = (int(n, 16) for n in line.split()[0].split('-'))\n"
        "    elif line.startswith('VmFlags') and first <= place < end:\n"
        "        print('hg' in line.split())\n"
    )
    for value, asks in (("1", "True"), ("0", "False")):
        env = os.environ | {huge_pages.VARIABLE: value}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == asks, done.stderr


def test_libgomp_reads_it_from_an_environment_that_is_set_by_python() -> None:
    code = f"import os; os.environ.update({SETTINGS}); os.environ['OMP_DISPLAY_ENV'] = 'verbose'; import torch"
    env = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch has another OpenMP runtime")
    assert f"GOMP_SPINCOUNT = '{SETTINGS['GOMP_SPINCOUNT']}'" in done.stderr


def test_the_doctor_says_how_threads_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert waiting() == "milliseconds: as the OpenMP runtime comes"
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    assert waiting() == "GOMP_SPINCOUNT=10000"


def test_the_page_exports_what_commands_set() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "memory.md").read_text()
    assert "export " + " ".join(f"{name}={value}" for name, value in SETTINGS.items()) in page
