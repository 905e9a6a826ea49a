"""What is measured on the user's own machine: which of two backends is faster there, and how slow a slow one is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from nnunetv2_lightnets.ops import tuning
from nnunetv2_lightnets.ops.scan_order import scan_order
from nnunetv2_lightnets.ops.selective_scan import chunked
from nnunetv2_lightnets.ops.selective_scan.backend import Backend
from nnunetv2_lightnets.ops.selective_scan.probe import KINDS, small_scan
from nnunetv2_lightnets.ops.selective_scan.record import Scan

# Channels and sides of what is measured: LightM-UNet's first stage, 65,536 tokens of it, and Swin-UMamba's.
SIZES = {"plain": (64, (256, 256)), "directional": (192, (80, 80))}
_ROUNDS = 3


def scan_of_size(kind: str, dtype: torch.dtype, device: torch.device) -> Scan:
    """A scan as published networks make it: along rows and along columns where it is directional."""
    channels, sides = SIZES[kind]
    scan = small_scan(kind, device, channels, sides[0] * sides[1])
    if scan.order is not None:
        scan = replace(scan, order=scan_order(sides, device=device)[:2])
    u, delta, B, C = (x.to(dtype) for x in (scan.u, scan.delta, scan.B, scan.C))
    return replace(scan, u=u, delta=delta, B=B, C=C, z=None if scan.z is None else scan.z.to(dtype))


def faster(backends: Sequence[Backend], kind: str, dtype: torch.dtype, device: torch.device) -> Backend:
    """The backend that is fastest forwards and backwards on this GPU, measured once; the first where that cannot be.

    What is measured stays on disk, see :mod:`nnunetv2_lightnets.ops.tuning`: one choice for each kind of scan and
    dtype, under the names of the card and of the versions.
    """
    by_name = {backend.NAME: backend for backend in backends}
    made: list[Scan] = []

    def run(name: str) -> None:
        if not made:
            made.append(scan_of_size(kind, dtype, device))
        out, _, states = by_name[name].forward(made[0], True)
        by_name[name].backward(made[0], (out, None), states)

    return by_name[tuning.choose("backend", _key(kind, dtype), tuple(by_name), run, device)]


@cache
def _key(kind: str, dtype: torch.dtype) -> tuple[str, str, str]:
    try:
        mamba = version("mamba-ssm")
    except PackageNotFoundError:
        mamba = "of unknown version"
    return f"{kind} scans", str(dtype).removeprefix("torch."), f"mamba-ssm {mamba}"


def slowdown(device: torch.device) -> float | None:
    """How many times as long a forward scan by backend "torch" takes as its data takes to be read and written once.

    Medians, measured in about a second or less. None where that cannot be measured, for whatever reason.
    """
    try:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        with torch.inference_mode():
            scan = small_scan(KINDS[0], device, length=32768 if device.type == "cuda" else 4096)
            moved: list[Tensor | None] = [scan.u, scan.delta, scan.B, scan.C, scan.z, scan.u]  # the output is like u
            half = torch.empty(sum(x.nbytes for x in moved if x is not None) // 2, dtype=torch.uint8, device=device)
            target = torch.empty_like(half)
            scanning = _median_seconds(lambda: chunked.forward(scan, False), device)
            return scanning / _median_seconds(lambda: target.copy_(half), device)
    except Exception:  # it is a number in a message, and must stop nothing
        return None


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    def timed() -> float:
        _wait_for(device)
        start = time.perf_counter()
        run()
        _wait_for(device)
        return time.perf_counter() - start

    timed()  # loads kernels and fills caches
    return statistics.median(timed() for _ in range(_ROUNDS))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
