# mypy: ignore-errors
"""The smallest kernel that shows whether Triton compiles and launches; ``triton_runtime.py`` asks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def double_kernel(x, SIZE: tl.constexpr):
    """Double all numbers."""
    place = tl.arange(0, SIZE)
    tl.store(x + place, 2 * tl.load(x + place))


def run(device: torch.device) -> int:
    """2 * (0 + 1 + ... + 63) on that device, which is the current one."""
    x = torch.arange(64, device=device)
    double_kernel[(1,)](x, SIZE=64)
    return int(x.sum())
