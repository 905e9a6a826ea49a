"""Fixtures all tests share: golden files, threads, reproducible randomness."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_server import Commands
from safetensors.torch import load_file

from nnunet_commands import ID, NNUNet, write_mni_blocks
from wheels import build_wheel, fresh_environment

ROOT = Path(__file__).resolve().parent.parent
GOLDEN_COPIES = ROOT / "tests" / "golden"  # the small ones, kept in the repository
GOLDEN = Path(os.environ.get("LIGHTNETS_GOLDEN", ROOT.parent / "shared" / "golden"))


@dataclass
class GoldenCase:
    """One file of what the authors' own code computes; its tensors are grouped by the first part of their key."""

    name: str
    manifest: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(repr=False)

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors under ``prefix/``, by the rest of their key, in float32 where the file says float16."""
        start = prefix + "/"
        return {
            key[len(start) :]: tensor.float() if tensor.dtype == torch.float16 else tensor
            for key, tensor in self.tensors.items()
            if key.startswith(start)
        }

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return self.group("state")

    def ordered(self, kind: str, tag: str) -> list[torch.Tensor]:
        """Inputs or outputs of one tag in their order; ``kind`` is "input" or "output"."""
        found = self.group(f"{kind}/{tag}")
        return [found[key] for key in sorted(found, key=int)]


@pytest.fixture
def golden() -> Callable[[str], GoldenCase]:
    """Reader of golden files by name; skips the test where the file is not at hand."""

    def load(name: str) -> GoldenCase:
        for folder in (GOLDEN, GOLDEN_COPIES):
            file, manifest = folder / f"{name}.safetensors", folder / "manifest.json"
            if file.is_file() and manifest.is_file():
                return GoldenCase(name, json.loads(manifest.read_text())[name], load_file(file))
        pytest.skip(f"golden file {name}.safetensors is not in {GOLDEN} (set LIGHTNETS_GOLDEN)")

    return load


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """nnU-Net's commands without imports before each, for tests of more than that they start; folders of ``nnunet``."""
    commands = Commands(tmp_path_factory.mktemp("nnU-Net folders"))  # a space in the path, as on many machines
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def nnunet(forked: Commands) -> NNUNet:
    """nnU-Net's folders with a small real data set, planned and preprocessed for 2d and 3d_fullres."""
    pytest.importorskip("nilearn")
    nnunet = NNUNet(forked.folder)
    write_mni_blocks(nnunet.raw)
    forked.must("nnUNetv2_plan_and_preprocess", "-d", str(ID), "-c", "3d_fullres", "2d", "-np", "1")
    return nnunet


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def fresh_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel and nnU-Net."""
    return fresh_environment(tmp_path_factory.mktemp("a fresh environment"), wheel)
