"""Bytes that the scan's kernels on GPUs take beside their arguments and results, for those who plan memory.

Counted from what ``triton_scan.py`` allocates, for the candidate of its tiles that takes most. What a CPU takes beside
results is some tiles for each thread, and counts as nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nnunetv2_lightnets.ops.selective_scan import triton_scan
from nnunetv2_lightnets.ops.selective_scan.record import CHUNK, Scan
from nnunetv2_lightnets.ops.selective_scan.triton_scan import BACKWARD, FORWARD, Tiles
from nnunetv2_lightnets.ops.triton_runtime import ceil_div, multiprocessors

USUAL_MULTIPROCESSORS = 108  # where no GPU is at hand: those of an A100
_TILES_OF_A_CHUNK = 16  # triton_kernels.TILES, whose import would need Triton


def forward(*arguments: Any) -> int:
    """Of a call of the operator ``selective_scan``, whose arguments these are, if it ran on a GPU."""
    scan = Scan(*arguments[:11])
    walk = max(_segment_states(scan, tiles, _blocks(scan, tiles)) for tiles in FORWARD)
    copies = 0 if scan.order is None else scan.directions * scan.u.numel() * scan.dtype.itemsize
    return walk + copies


def backward(*arguments: Any) -> int:
    """Of a call of the operator ``selective_scan_backward``."""
    scan = Scan(*arguments[2:13])
    return max(_backward(scan, tiles) for tiles in BACKWARD)


OPERATORS: dict[str, Callable[..., int]] = {"selective_scan": forward, "selective_scan_backward": backward}


def _backward(scan: Scan, tiles: Tiles) -> int:
    groups = scan.B.shape[1] // (1 if scan.order is None else scan.directions)
    rows = _sequences(scan) * groups
    block_d = _channel_block(scan, tiles)
    parts = ceil_div(scan.u.shape[1] // groups, block_d)  # at most
    segments, _ = triton_scan._cut(scan.u.shape[2], rows, _wanted(tiles))
    states, size = scan.A.shape[-1], scan.dtype.itemsize
    scratch = rows * parts * segments * CHUNK // _TILES_OF_A_CHUNK * _power_of_two(states) * block_d
    sums = _sequences(scan) * segments * (states + 2) * scan.u.shape[1]
    copies = 2 * parts * scan.B.numel() + (0 if scan.order is None else scan.directions * scan.u.numel())
    return (scratch + sums + copies) * size + _segment_states(scan, tiles, rows)


def _segment_states(scan: Scan, tiles: Tiles, programs: int) -> int:
    """States at the ends and at the starts of all segments, and sums of step sizes."""
    segments, _ = triton_scan._cut(scan.u.shape[2], programs, _wanted(tiles))
    return _sequences(scan) * segments * scan.u.shape[1] * (2 * scan.A.shape[-1] + 1) * scan.dtype.itemsize


def _sequences(scan: Scan) -> int:
    return scan.u.shape[0] * scan.directions


def _blocks(scan: Scan, tiles: Tiles) -> int:
    return _sequences(scan) * ceil_div(scan.u.shape[1], _channel_block(scan, tiles))


def _channel_block(scan: Scan, tiles: Tiles) -> int:
    return max(1, min(64, tiles.elements // _power_of_two(scan.A.shape[-1])))


def _wanted(tiles: Tiles) -> int:
    """Programs."""
    if torch.cuda.is_available():
        return tiles.programs * multiprocessors(torch.device("cuda", torch.cuda.current_device()))
    return tiles.programs * USUAL_MULTIPROCESSORS


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
