"""Backend "triton" without a GPU: its kernels compile for several, and keep what they compute with in registers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ops.triton_process import TritonProcess

pytest.importorskip("triton.backends.nvidia")


def _resources(folder: Path, capabilities: list[int], kind: str = "plain", **case: Any) -> list[dict[str, Any]]:
    process = TritonProcess(folder, interpret=False)
    try:
        found: list[dict[str, Any]] = process("resources", kind=kind, capabilities=capabilities, **case)
    finally:
        process.close()
    return found


def _check(found: list[dict[str, Any]], kernels: set[str], capabilities: list[int]) -> None:
    assert {(x["kernel"], x["capability"]) for x in found} == {(name, c) for name in kernels for c in capabilities}
    assert not [x for x in found if x["stack"]]  # spilled registers lie on the stack
    assert max(x["registers"] for x in found) <= 255


def test_a_short_scan_spills_no_registers(tmp_path: Path) -> None:
    """One segment: the outputs are all that is computed."""
    found = _resources(
        tmp_path, [80], batch=1, channels=64, length=64, states=16, z=False, dtype="float32", backward=False
    )
    _check(found, {"forward_kernel"}, [80])


@pytest.mark.slow
def test_a_long_scan_spills_no_registers(tmp_path: Path) -> None:
    """LightM-UNet at 64^3, forwards and backwards, with all options: all kernels, on A100, RTX 30 and H100."""
    capabilities = [80, 86, 90]
    found = _resources(tmp_path, capabilities, batch=1, channels=64, length=262_144, states=16, dtype="float32")
    kernels = {"segment_ends", "carry", "forward", "adjoint_ends", "backward"}
    _check(found, {f"{name}_kernel" for name in kernels}, capabilities)


@pytest.mark.slow
def test_a_directional_scan_spills_no_registers(tmp_path: Path) -> None:
    """Swin-UMamba's widest scans, 80 x 80 pixels in four directions, forwards and backwards."""
    capabilities = [80, 86, 90]
    case = {"batch": 2, "channels": 768, "length": 6_400, "states": 16, "directions": 4, "dtype": "float32"}
    found = _resources(tmp_path, capabilities, kind="directional", **case)
    kernels = {x["kernel"] for x in found}
    assert {"forward_kernel", "backward_kernel"} <= kernels
    _check(found, kernels, capabilities)
