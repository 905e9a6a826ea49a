"""Backend "triton" without a GPU: its kernels compile for all of them, and keep what they compute with in registers.

With the installed Triton, and with those in the folders that LIGHTNETS_TRITON names (``pip install --no-deps --target
FOLDER triton==3.6.0``).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.ops.triton_process import TritonProcess

pytest.importorskip("triton.backends.nvidia")

CAPABILITIES = [70, 75, 80, 86, 89, 90, 100, 120]  # from Volta to Blackwell; 90 is Hopper
FEW = [75, 90, 120]
OTHERS = [Path(folder) for folder in filter(None, os.environ.get("LIGHTNETS_TRITON", "").split(os.pathsep))]
# LightM-UNet at 64^3, whose sequence is cut into segments, and Swin-UMamba's widest scans, 80 x 80 pixels.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"batch": 1, "channels": 64, "length": 262_144, "states": 16},
    "directional": {"batch": 2, "channels": 768, "length": 6_400, "states": 16, "directions": 4},
}
KERNELS = {f"{name}_kernel" for name in ("segment_ends", "carry", "forward", "adjoint_ends", "backward")}


def _check(folder: Path, capabilities: list[int], kind: str, triton: Path | None = None, **case: Any) -> None:
    process = TritonProcess(folder, interpret=False, triton=triton)
    try:
        found = process("resources", kind=kind, capabilities=capabilities, **{**CASES[kind], **case})
    finally:
        process.close()
    kernels = {x["kernel"] for x in found}
    # The directional scans have channels enough for the GPU: some tiles leave their sequences whole.
    assert kernels == {"forward_kernel"} if "backward" in case else {"forward_kernel", "backward_kernel"} <= kernels
    assert kernels == KERNELS or kind == "directional" or "backward" in case
    assert {(x["kernel"], x["capability"]) for x in found} == {(k, c) for k in kernels for c in capabilities}
    # Spilled registers lie on the stack. The tiles that are taken unmeasured have none.
    most = 16 if case.get("candidate") else 0
    assert not [x for x in found if x["stack"] > most]
    assert triton is None or {x["triton"] for x in found} == {triton.name}, "folders have the names of versions"


def test_a_short_scan_spills_no_registers(tmp_path: Path) -> None:
    """One segment: the outputs are all that is computed."""
    _check(tmp_path, [80], "plain", length=64, z=False, dtype="float32", backward=False)


def test_one_compilation_serves_all_stages_of_a_network(tmp_path: Path) -> None:
    """Sizes, and B and C as slices that start anywhere in a row of any width, make no other kernels."""
    stages = [
        {"batch": 2, "channels": channels, "length": length, "states": 16, "rank": rank, "dtype": "float32"}
        for channels, length, rank in ((64, 4096, 2), (128, 512, 4), (256, 320, 8), (512, 200, 16))
    ]
    process = TritonProcess(tmp_path, interpret=False)
    try:
        found = process("variants", stages=stages)
    finally:
        process.close()
    assert set(found) == KERNELS
    # Pass 2 with and without a first state, forwards and backwards, over segments and over runs of them.
    assert found.pop("carry_kernel") <= 6
    assert set(found.values()) == {1}, found


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", CASES)
def test_scans_compile_for_every_gpu(tmp_path: Path, kind: str, dtype: str) -> None:
    _check(tmp_path, CAPABILITIES, kind, dtype=dtype)


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize("candidate", [1, 2])
@pytest.mark.parametrize("kind", CASES)
def test_all_tiles_compile(tmp_path: Path, kind: str, candidate: int) -> None:
    _check(tmp_path, FEW, kind, dtype="bfloat16", candidate=candidate)


@pytest.mark.slow
@pytest.mark.skipif(not OTHERS, reason="LIGHTNETS_TRITON names no folders")
@pytest.mark.parametrize("triton", OTHERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("kind", CASES)
def test_scans_compile_with_other_versions(tmp_path: Path, kind: str, triton: Path) -> None:
    _check(tmp_path, FEW, kind, triton, dtype="float32")
