"""Wheels of this tree, for tests of what an install makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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
