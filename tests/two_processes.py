"""Tests of what two real processes do together: a test file that is also their script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_in_two_processes(script: str, folder: Path) -> None:
    """``python script folder rank`` for ranks 0 and 1, at once; both must end well."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(rank)], stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
