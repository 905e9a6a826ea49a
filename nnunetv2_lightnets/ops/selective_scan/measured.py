"""What is measured on the user's own machine: which of two backends is faster there, and how slow a slow one is.

Both measurements take a scan of the size and layout that the networks here pass: N 16, softplus, bias and D, channels
as neighbours in memory; plain scans with a gate, directional ones along four paths.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from nnunetv2_lightnets.ops import tuning
from nnunetv2_lightnets.ops.scan_order import scan_order
from nnunetv2_lightnets.ops.selective_scan import chunked
from nnunetv2_lightnets.ops.selective_scan.backend import Backend
from nnunetv2_lightnets.ops.selective_scan.record import Scan
from nnunetv2_lightnets.ops.tensors import compute_dtype

STATE = 16
# Channels and sides, plain and directional: of LightM-UNet's first stage, with 65,536 tokens, and of Swin-UMamba's.
SIZES = {False: (64, (256, 256)), True: (192, (80, 80))}
_ROUNDS = 3


def published_scan(
    device: torch.device,
    directional: bool,
    channels: int,
    sides: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> tuple[Scan, Tensor]:
    """A scan as published networks make it, of an image with these sides, and a gradient of its output.

    Args:
        device: Of all tensors. The random numbers are a generator's own: torch's stay as they are.
        directional: Whether it follows four paths, or has a gate and two groups.
        channels: D.
        sides: Height and width.
        dtype: Of the tokens.
    """
    generator = torch.Generator(device).manual_seed(0)
    compute = compute_dtype(torch.empty(0, dtype=dtype))
    length, paths = sides[0] * sides[1], [4] if directional else []

    def tokens(*shape: int) -> Tensor:  # (..., rows, L), with rows as neighbours in memory
        *outer, rows = shape
        return torch.randn(*outer, length, rows, generator=generator, device=device).to(dtype).transpose(-1, -2)

    def parameter(*shape: int) -> Tensor:
        return torch.randn(*paths, *shape, generator=generator, device=device).to(compute)

    scan = Scan(
        tokens(1, channels),
        tokens(1, *paths, channels),
        -parameter(channels, STATE).exp(),
        tokens(1, 4 if directional else 2, STATE),
        tokens(1, 4 if directional else 2, STATE),
        parameter(channels),
        None if directional else tokens(1, channels),
        parameter(channels) - 3,  # step sizes of about 0.05 after the softplus, as initialised
        order=scan_order(sides, device=device) if directional else None,
        delta_softplus=True,
    )
    return scan, tokens(1, channels)


def faster(backends: Sequence[Backend], directional: bool, dtype: torch.dtype, device: torch.device) -> Backend:
    """The backend that is fastest forwards and backwards on this GPU, measured once; the first where that cannot be.

    What is measured stays on disk, see :mod:`nnunetv2_lightnets.ops.tuning`: one choice for plain and one for
    directional scans in each dtype, under the names of the card and of the versions.
    """
    by_name = {backend.NAME: backend for backend in backends}
    made: list[tuple[Scan, Tensor]] = []

    def run(name: str) -> None:
        if not made:
            channels, sides = SIZES[directional]
            made.append(published_scan(device, directional, channels, sides, dtype))
        scan, grad = made[0]
        states = by_name[name].forward(scan, True)[2]
        by_name[name].backward(scan, (grad, None), states)

    return by_name[tuning.choose("backend", _key(directional, dtype), tuple(by_name), run, device)]


@cache
def _key(directional: bool, dtype: torch.dtype) -> tuple[str, str, str]:
    try:
        mamba = version("mamba-ssm")
    except PackageNotFoundError:
        mamba = "of unknown version"
    kind = "directional scans" if directional else "plain scans"
    return kind, str(dtype).removeprefix("torch."), f"mamba-ssm {mamba}"


def slowdown(device: torch.device) -> float | None:
    """How many times as long a forward scan by backend "torch" takes as its data takes to be read and written once.

    Medians, measured in under a second on a GPU. None where that cannot be measured, for whatever reason.
    """
    try:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        with torch.inference_mode():
            channels, sides = SIZES[False]
            if device.type != "cuda":
                sides = (128, 128)
            scan, out = published_scan(device, False, channels, sides)
            needed = [scan.u, scan.delta, scan.B, scan.C, scan.z, out]
            half = torch.empty(sum(x.nbytes for x in needed if x is not None) // 2, dtype=torch.uint8, device=device)
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
