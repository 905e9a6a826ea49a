"""Wheels of this tree, for tests of what an install makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("nnunetv2_lightnets", "plans", "trainers", "start_up", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def build_wheel(folder: Path, **environment: str) -> Path:
    """A wheel built in ``folder`` from a copy of the tree, in which nothing is built yet."""
    source, wheels = folder / "source", folder / "wheels"
    source.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    return wheel


def fresh_environment(folder: Path, wheel: Path) -> Path:
    """The Python of a new environment in ``folder`` with this wheel, and nnU-Net with its commands.

    Torch and the other libraries are borrowed from the environment that runs the tests: their folder is on the path,
    but its start-up files, and with them the editable install of this tree, are not read.
    """
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "zz_borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    nnunet = f"nnunetv2=={version('nnunetv2')}"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    command += ["--no-deps", "--ignore-installed", wheel, nnunet]
    subprocess.run(command, check=True, env=clean_environment())
    return python


def clean_environment(**more: str) -> dict[str, str]:
    """The environment variables of this process without nnU-Net's, and without another path for Python."""
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("NNUNET", "PYTHONPATH"))}
    return kept | more
