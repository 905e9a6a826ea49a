"""What is installed: pyproject names every package of the tree, so that no new one is left out of the wheel."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_package_is_installed() -> None:
    listed = re.search(r"^packages = (\[.*?^\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert listed is not None
    found = {
        ".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "nnunetv2_lightnets").rglob("__init__.py")
    }
    found |= {f"nnunetv2_lightnets.{name}" for name in ("plans", "trainers")}  # they stand at the root
    assert set(ast.literal_eval(listed[1])) == found
