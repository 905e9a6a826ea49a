"""The causal convolution on GPUs, by Triton (``causal_conv1d_triton_kernels.py``, see ``triton_runtime.py``).

Arguments as in ``causal_conv1d.py``, which checks them and asks :func:`takes` first.

Memory is read and written once, whatever the strides: forwards x and y, backwards x, the gradient and dx; what the
kernel's taps see of their neighbours' tokens comes from the caches. The value before SiLU is computed again in
registers. Gradients of weight and bias are sums per program, (WIDTH + 1) * D numbers each, which torch then adds up:
no atomic operations, so the same call with the same tile gives the same bits. Which tile is the fastest is measured
(``tuning.py``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnunetv2_lightnets.ops import causal_conv1d_torch, tuning
from nnunetv2_lightnets.ops import triton_runtime as runtime
from nnunetv2_lightnets.ops.tensors import compute_dtype, in_one_line

WIDEST_KERNEL = 8
LONGEST = 2**30  # token counts are 32-bit numbers in the kernels
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PROGRAMS = 16  # of the backward pass, wanted for each multiprocessor: more would write more sums

_logger = logging.getLogger("nnunetv2_lightnets")


class Tile(NamedTuple):
    """What a program works on: ``tokens * block_l`` tokens of ``block_d`` channels, with so many warps."""

    tokens: int
    block_l: int
    block_d: int
    warps: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.block_l} tokens, {self.block_d} channels, {self.warps} warps"


# Where channels are neighbours in memory, and where tokens are; the first is taken where nothing can be measured.
ROWS = (Tile(4, 8, 64, 8), Tile(8, 4, 32, 2), Tile(4, 8, 64, 4), Tile(4, 4, 128, 4))
COLUMNS = (Tile(8, 32, 4, 4), Tile(4, 64, 4, 4), Tile(2, 128, 2, 4), Tile(1, 128, 4, 4))


@cache
def _kernels() -> ModuleType:
    """The kernels' module; importing it imports Triton."""
    from nnunetv2_lightnets.ops import causal_conv1d_triton_kernels

    return causal_conv1d_triton_kernels


def unavailable(device: torch.device, rows: bool = True) -> str | None:
    """Why the kernels cannot be used on a device; None once they give there what torch's operations do.

    Args:
        device: Of the tensors.
        rows: Whether channels are neighbours in memory, rather than tokens.
    """
    if device.type != runtime.device_type():
        return f"takes tensors on {runtime.device_type()}, not on {device.type}"
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    proved = _proved(index, rows)
    return proved if isinstance(proved, str) else None


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels can be used for this convolution."""
    return (
        x.device.type == runtime.device_type()
        and x.dtype in DTYPES
        and weight.shape[1] <= WIDEST_KERNEL
        and x.shape[2] <= LONGEST
        and unavailable(x.device, _rows(x)) is None
    )


_proofs: dict[tuple[int | None, bool], tuple[Tile, ...] | str] = {}


def _proved(index: int | None, rows: bool) -> tuple[Tile, ...] | str:
    """The tiles that compute right on a GPU (None: on the CPU) in a layout, or why there is none; found once."""
    if (index, rows) in _proofs:
        return _proofs[index, rows]
    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is recorded, and the kernels have not been tried before"
    if (reason := runtime.unavailable(index)) is not None:  # the scan, which it stops as well, warns
        _proofs[index, rows] = reason
        return reason
    table = ROWS if rows else COLUMNS
    try:
        reasons = {tile: _fault(device, tile) for tile in (table[:1] if index is None else table)}
    except torch.OutOfMemoryError as error:  # it may be otherwise at the next call
        return f"it cannot be checked on this GPU now ({in_one_line(error)})"
    proved = tuple(tile for tile, reason in reasons.items() if reason is None)
    if not proved:
        _logger.warning("causal convolution on %s: no Triton kernel (%s), which costs time", device, reasons[table[0]])
    _proofs[index, rows] = proved or str(reasons[table[0]])
    return _proofs[index, rows]


@torch.no_grad()
def _fault(device: torch.device, tile: Tile) -> str | None:
    """Compare a convolution of published kind, and its gradients, with torch's operations."""
    channels, length, width = 64, 2 * ROWS[0].tokens * ROWS[0].block_l - 3, 4
    numbers = torch.linspace(-3, 3, 2 * 2 * length * channels, device=device).sin_().view(2, 2, length, channels)
    x, grad = (part.transpose(1, 2) for part in numbers)  # channels-last
    if tile in COLUMNS:
        x, grad = x.contiguous(), grad.contiguous()
    weight = torch.linspace(-1, 1, channels * width, device=device).view(channels, width)
    arguments = (x, weight, torch.linspace(-1, 1, channels, device=device), True)
    wanted = (causal_conv1d_torch.forward(*arguments), *causal_conv1d_torch.backward(grad, *arguments))

    times = []
    for _ in range(2):  # the first call compiles
        start = time.perf_counter()
        try:
            found = forward(*arguments, tile), *backward(grad, *arguments, tile)
            for name, value, expected in zip(("output", "dx", "dweight", "dbias"), found, wanted, strict=True):
                if value is None or expected is None or not torch.allclose(value, expected, rtol=1e-4, atol=1e-4):
                    return f"of a small call, its {name} is wrong"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers and drivers raise what they like
            return f"it fails on a small call ({in_one_line(error)})"
        times.append(time.perf_counter() - start)
    message = "causal convolution on %s by %s: Triton's results are torch's (checked in %.2f s, after %.1f s)"
    _logger.info(message, device, tile, times[1], times[0])
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, tile: Tile | None = None) -> Tensor:
    """The convolution (B, D, L), in the dtype and memory layout of ``x``; with a tile of one's own for tests."""
    arguments = _arguments(x, weight, bias, silu)
    y = torch.empty_like(x)
    arguments |= _tensor("y", y)

    def run(tile: Tile) -> None:
        parts = runtime.ceil_div(x.shape[2], tile.tokens * tile.block_l)
        _launch(_kernels().conv_forward_kernel, x, arguments, tile, parts)

    with runtime.on(x.device):
        run(tile or _choose("forward", x, weight, silu, run))
    return y


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias (None where the bias is None), each in the dtype of its argument."""
    batch, channels, length = x.shape
    width = weight.shape[1]
    arguments = _arguments(x, weight, bias, silu)
    dx = torch.empty_like(x)
    arguments |= {**_tensor("grad", grad.resolve_neg()), **_tensor("dx", dx)}

    def run(tile: Tile) -> Tensor:
        tiles = runtime.ceil_div(length, tile.tokens * tile.block_l)
        rows = batch * runtime.ceil_div(channels, tile.block_d)
        parts = min(tiles, runtime.ceil_div(PROGRAMS * runtime.multiprocessors(x.device), rows))
        tiles_per_part = runtime.ceil_div(tiles, parts)
        parts = runtime.ceil_div(tiles, tiles_per_part)
        sums = x.new_empty((batch * parts, width + 1, channels), dtype=compute_dtype(x))
        # Left alone, the assembler spills a few bytes where it then finds room for another warp.
        more = {"sums": sums, "tiles_per_part": tiles_per_part, "maxnreg": 255}
        _launch(_kernels().conv_backward_kernel, x, {**arguments, **more}, tile, parts)
        return sums

    with runtime.on(x.device):
        sums = run(tile or _choose("backward", x, weight, silu, run)).sum(0)
    dbias = None if bias is None else sums[width].to(bias.dtype)
    return dx, sums[:width].T.to(weight.dtype), dbias


def _arguments(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> dict[str, Any]:
    """What both kernels take."""
    return {
        **_tensor("x", x.resolve_neg()),
        "weight": weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "channels": x.shape[1],
        "length": x.shape[2],
        "WIDTH": weight.shape[1],
        "SILU": silu,
        "ROWS": _rows(x),
    }


def _tensor(name: str, x: Tensor) -> dict[str, Any]:
    """A tensor (B, D, L) and its strides."""
    return {name: x, **dict(zip((f"{name}_batch", f"{name}_d", f"{name}_l"), x.stride(), strict=True))}


def _rows(x: Tensor) -> bool:
    """Whether channels are neighbours in memory, rather than tokens."""
    return x.stride(1) == 1 or x.stride(2) != 1


def kind(x: Tensor, weight: Tensor, silu: bool) -> tuple[str, ...]:
    """What the fastest way to compute a call depends on; the same for all calls of about its size."""
    sizes = (x.shape[0] * x.shape[2], x.shape[1])
    return (
        str(x.dtype).removeprefix("torch."),
        "channels-last" if _rows(x) else "channels-first",
        f"kernel size {weight.shape[1]}{', SiLU' if silu else ''}",
        "up to {} tokens, {} channels".format(*(1 << (size - 1).bit_length() for size in sizes)),
    )


def _choose(direction: str, x: Tensor, weight: Tensor, silu: bool, run: Callable[[Tile], object]) -> Tile:
    tiles: tuple[Tile, ...] = ROWS if _rows(x) else COLUMNS
    if x.is_cuda and not isinstance(proved := _proved(x.device.index, _rows(x)), str):
        tiles = proved
    return tuning.choose(f"causal convolution, {direction}", kind(x, weight, silu), tiles, run, x.device)


def _launch(kernel: Any, x: Tensor, arguments: dict[str, Any], tile: Tile, parts: int) -> None:
    language = _kernels().tl
    block_d = min(tile.block_d, 1 << (x.shape[1] - 1).bit_length())
    blocks = runtime.ceil_div(x.shape[1], block_d)
    more = {
        "blocks": blocks,
        "parts": parts,
        "TOKENS": tile.tokens,
        "BLOCK_L": tile.block_l,
        "BLOCK_D": block_d,
        "ACC": language.float64 if x.dtype == torch.float64 else language.float32,
        "num_warps": tile.warps,
        "enable_fp_fusion": True,  # multiply-adds; later versions of Triton will want to be told
    }
    runtime.launch(kernel, x.shape[0] * blocks * parts, {**arguments, **more})
