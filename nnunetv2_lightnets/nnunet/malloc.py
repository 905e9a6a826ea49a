"""Freed memory is used again, instead of going back to the system after every layer.

A network's feature maps have tens of megabytes. The C library of Linux (glibc) gets such blocks from the system one by
one and gives each back when it is freed, so every layer waits until the kernel has cleared its pages: at 128 x 128 x
128 voxels U-Lite spent more time so than in computing (benchmarks/page_faults.py).
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache

import torch
from torch import nn

LARGEST = 1 << 30  # bytes of a block that is kept; larger ones (whole images) go back to the system
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of mallopt, in malloc.h


@cache
def reuse_freed_memory() -> bool:
    """Let this process keep freed blocks of up to 1 GiB for its next allocations, from now on.

    Returns:
        Whether that was done: only glibc is told so, other systems are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Older releases of glibc refuse a threshold above 32 MiB; there larger blocks are kept, too.
    kept = mallopt(_M_MMAP_THRESHOLD, LARGEST) or mallopt(_M_MMAP_MAX, 0)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))


def reuse_freed_memory_on_cpu(network: nn.Module) -> None:
    """Call :func:`reuse_freed_memory` when ``network`` first gets an input on a CPU."""

    def before_forward(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].device.type == "cpu":
            reuse_freed_memory()

    network.register_forward_pre_hook(before_forward)
