"""Everything of nnU-Net that we touch: its failure names the symbol that a new release has moved or changed.

``.ci/contract`` runs this file against each release that we support.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from nnunetv2_lightnets.nnunet import contract

ROOT = Path(__file__).resolve().parent.parent
WHEELS = os.environ.get("LIGHTNETS_NNUNET_WHEELS")  # folder of other releases


def imports() -> list[str]:
    """Each name that our code imports from nnU-Net, wherever in a file it does, as ``module:name``."""
    found = set()
    for folder in ("nnunetv2_lightnets", "plans", "trainers"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nnunetv2":
                    found |= {f"{node.module}:{alias.name}" for alias in node.names}
    return sorted(found)


def test_what_is_imported_is_in_the_contract() -> None:
    named = {path.partition(":")[0] + ":" + path.partition(":")[2].partition(".")[0] for path in contract.NAMES}
    assert set(imports()) - named == set()


@pytest.mark.parametrize("path", contract.NAMES)
def test_names_and_signatures(path: str) -> None:
    assert contract.name_fault(path) is None


@pytest.mark.parametrize("name", contract.PROPERTIES)
def test_properties_of_a_configuration(name: str) -> None:
    assert contract.property_fault(name) is None


@pytest.mark.parametrize("path", contract.SOURCES)
def test_sources_we_rely_on(path: str) -> None:
    assert contract.source_fault(path) is None


def test_the_renamed_argument_of_the_next_release_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{contract.TRAINER}.load_checkpoint"
    trainer = contract.symbol(contract.TRAINER)
    monkeypatch.setattr(trainer, "load_checkpoint", lambda self, checkpoint: None)
    assert contract.name_fault(path) is None
    monkeypatch.setattr(trainer, "load_checkpoint", lambda self, checkpoint, strict: None)
    assert contract.name_fault(path) == f"{path} takes self, checkpoint, strict"


def test_all_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert contract.faults() == []
    monkeypatch.delattr(contract.symbol(contract.TRAINER), "train_step")
    monkeypatch.delattr(contract.symbol(f"{contract.PLANS}:ConfigurationManager"), "patch_size")
    monkeypatch.setitem(contract.SOURCES, f"{contract.TRAINER}.initialize", ["self.build_a_castle()"])
    assert contract.faults() == [
        f"{contract.TRAINER}.train_step is missing",
        f"{contract.PLANS}:ConfigurationManager.patch_size is missing",
        f"{contract.TRAINER}.initialize no longer has 'self.build_a_castle()', or not in this order",
    ]


@pytest.mark.slow
@pytest.mark.by_hand
def test_other_releases(tmp_path: Path) -> None:
    """This file, against every wheel of nnU-Net in the folder that LIGHTNETS_NNUNET_WHEELS names."""
    wheels = sorted(Path(WHEELS).glob("nnunetv2-*.whl")) if WHEELS else []
    if not wheels:
        pytest.skip("LIGHTNETS_NNUNET_WHEELS names no folder with wheels of nnU-Net; .ci/contract gets them")
    for wheel in wheels:
        release = tmp_path / wheel.stem
        zipfile.ZipFile(wheel).extractall(release)
        kept = {key: value for key, value in os.environ.items() if key != "LIGHTNETS_NNUNET_WHEELS"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-rs", __file__],
            env=kept | {"PYTHONPATH": str(release), "LIGHTNETS_NNUNET_RELEASE": wheel.name.split("-")[1]},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{wheel.name}\n{done.stdout[-4000:]}"


def test_release_is_the_one_meant() -> None:
    expected = os.environ.get("LIGHTNETS_NNUNET_RELEASE", version("nnunetv2"))
    found = importlib.util.find_spec("nnunetv2")
    assert version("nnunetv2") == expected, f"nnU-Net {version('nnunetv2')} at {found}, expected {expected}"
