"""What an install makes on a machine with a C compiler, and on one without."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from wheels import ROOT, build_wheel

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


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors have no AVX")
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here")
def test_a_compiler_without_avx_is_named(tmp_path: Path) -> None:
    real = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    old = tmp_path / "old-cc"
    old.write_text(
        f'#!/bin/sh\ncase "$*" in *-mavx*) echo "old-cc: what is AVX?" >&2; exit 1;; esac\nexec {real} "$@"\n'
    )
    old.chmod(0o755)
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "*.so", "__pycache__", "results", "docs"))
    command = [sys.executable, "setup.py", "build"]
    done = subprocess.run(
        command, cwd=source, env={**os.environ, "CC": str(old)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("avx2", "avx512"):
        assert f"no {name} kernels" in done.stdout + done.stderr
    assert "old-cc: what is AVX?" in done.stdout + done.stderr
    (library,) = (source / "build").rglob("liblightnets.so")
    assert library.stat().st_size


@pytest.mark.skipif(sys.platform != "linux", reason="wheels of other systems have other names")
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here")
def test_with_a_compiler(wheel: Path, tmp_path: Path) -> None:
    assert "-py3-none-linux_" in wheel.name
    assert _native(wheel, tmp_path / "unpacked") == "None"
