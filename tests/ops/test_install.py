"""What an install makes on a machine with a C compiler, and on one without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from wheels import build_wheel

pytestmark = pytest.mark.slow
NATIVE = "from nnunetv2_lightnets import ops; print(ops.__file__); print(ops.available_backends()['native'])"


def _native(wheel: Path, folder: Path) -> str:
    """What the package in the wheel says of its native backend."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    # Before all start-up files, which may import an installed copy.
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", NATIVE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=environment)
    file, said = done.stdout.strip().split("\n")
    assert Path(file).is_relative_to(folder)
    return said


def test_without_a_compiler(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CC="/nonexistent")
    assert wheel.name.endswith("-py3-none-any.whl")
    said = _native(wheel, tmp_path / "unpacked")
    assert "was not built" in said and "install a C compiler" in said


@pytest.mark.skipif(sys.platform != "linux", reason="wheels of other systems have other names")
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here")
def test_with_a_compiler(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    assert "-py3-none-linux_" in wheel.name
    assert _native(wheel, tmp_path / "unpacked") == "None"
