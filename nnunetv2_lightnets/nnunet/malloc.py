"""Freed memory is used again, instead of going back to the system after every layer.

A network's feature maps have tens of megabytes. The C library of Linux (glibc) gets such blocks from the system one by
one and gives each back when it is freed, so every layer waits until the kernel has cleared its pages: at 128 x 128 x
128 voxels U-Lite spent more time so than in computing (benchmarks/page_faults.py).

The cost is a larger process: a free block between others that are in use fits the next tensor or does not. So memory is
kept only where there is enough of it, and no longer once the machine, or a limit around this process, gets short of it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from nnunetv2_lightnets.nnunet.available import available_main_memory

SWITCH = "NNUNET_LIGHTNETS_KEEP_MEMORY"
LARGEST = 1 << 30  # bytes of a block that is kept; larger ones (whole images) go back to the system
LEAST_LEFT = 1 << 30  # bytes that can still be had; with less, nothing is kept
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of mallopt, in malloc.h
_NEVER = -1
_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")  # settings that stay if there are any
# Where glibc's own thresholds arrive by themselves once large blocks are freed.
_DEFAULTS = ((_M_MMAP_MAX, 65536), (_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 64 << 20))
_SECONDS = 1.0  # between two looks at what is left


class _Process:
    """What this process does with freed memory."""

    calls = 0
    keeps = False
    may_keep = True
    looked = 0.0  # time of the last look at what is left


def reuse_freed_memory() -> bool:
    """Let this process keep freed blocks of up to 1 GiB for its next allocations, as long as there is enough memory.

    To be called before every patch or training step; it costs microseconds. The first one shows how much memory they
    take: from the second on it is kept, if twice as much can be had. Once less than ``LEAST_LEFT`` is left, all goes
    back. Forked children do not keep theirs. With ``NNUNET_LIGHTNETS_KEEP_MEMORY=off`` nothing is kept.

    Returns:
        Whether freed memory is kept now: only glibc is told so, other systems are left as they are.
    """
    if not _can_keep() or not _Process.may_keep:
        return False
    _Process.calls += 1
    if _Process.calls == 2 and _left() >= max(LEAST_LEFT, 2 * _taken()):
        _Process.keeps, _Process.looked = _keep(), time.monotonic()
    elif _Process.keeps and time.monotonic() - _Process.looked > _SECONDS:
        _Process.looked = time.monotonic()
        if _left() < LEAST_LEFT:
            give_back()
    return _Process.keeps


def give_back() -> None:
    """Give all that is free back to the system, now and whenever more is freed, as the C library does by itself."""
    if _can_keep():
        _use_defaults()
        _glibc().malloc_trim(0)


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Freed memory goes back, as by itself, to see how much a step needs; afterwards it is as if none had run."""
    give_back()
    _Process.may_keep = False
    try:
        yield
    finally:
        _Process.calls, _Process.may_keep = 0, True


@cache
def _can_keep() -> bool:
    wanted = os.environ.get(SWITCH, "").strip().lower() not in ("off", "0", "false", "no")
    own = any(os.environ.get(name) for name in _USERS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return wanted and not own and platform.libc_ver()[0] == "glibc"


def _left() -> float:
    left = available_main_memory()
    return float("inf") if left is None else left


def _taken() -> int:
    """Bytes by which this process was larger at its largest than it is now."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        largest, now = (next(int(x.split()[1]) for x in lines if x.startswith(field)) for field in ("VmHWM", "VmRSS"))
    except (OSError, StopIteration):
        return 0
    return (largest - now) * 1024


def _glibc() -> Any:
    return ctypes.CDLL(None)


def _keep() -> bool:
    mallopt = _glibc().mallopt
    # Older releases of glibc refuse a threshold above 32 MiB; there larger blocks are kept, too.
    kept = mallopt(_M_MMAP_THRESHOLD, LARGEST) or mallopt(_M_MMAP_MAX, 0)
    os.register_at_fork(after_in_child=_use_defaults)  # nnU-Net's workers
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, _NEVER))


def _use_defaults() -> None:
    _Process.keeps = False
    for option, value in _DEFAULTS:
        _glibc().mallopt(option, value)


def reuse_freed_memory_on_cpu(network: nn.Module) -> RemovableHandle:
    """Call :func:`reuse_freed_memory` whenever ``network`` gets an input on a CPU, until the hook is removed."""

    def before_forward(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs and inputs[0].device.type == "cpu":
            reuse_freed_memory()

    return network.register_forward_pre_hook(before_forward)
