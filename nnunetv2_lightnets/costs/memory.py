"""Peak memory of what runs, on a GPU or in this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import torch

_PROCESS = Path("/proc/self")  # Linux


class Memory:
    """Peak memory: of the GPU's allocator, or of this process beyond what it held when this object was made.

    Where the system lets ``start`` forget no earlier peaks (no Linux, or /proc may not be written), ``restarts`` is
    false, and peaks are those since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = self.restarts = device.type == "cuda"
        _release_unused()
        self.before = 0 if self.cuda else _resident("VmRSS")

    def start(self) -> None:
        """Forget earlier peaks, where the system lets us."""
        _release_unused()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return
        self.restarts = False
        with contextlib.suppress(OSError):
            (_PROCESS / "clear_refs").write_text("5")  # restarts VmHWM
            self.restarts = True

    def peak(self) -> int:
        """Bytes at most since ``start``; since the process began where ``restarts`` is false."""
        if self.cuda:
            torch.cuda.synchronize()
            return int(torch.cuda.max_memory_allocated())
        return max(_resident("VmHWM") - self.before, 0)

    def measured(self) -> dict[str, Any]:
        """The peak as an entry of a row, which says so where it is not that of this measurement alone."""
        since = {} if self.restarts else {"memory_since": "the process began"}
        return {"memory": self.peak(), **since}


def _release_unused() -> None:
    """Give what nothing uses back to the system, or it counts as held before, and what reuses it does not count."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    """Bytes that this process holds (``VmRSS``) or held at most (``VmHWM``)."""
    if (_PROCESS / "status").exists():
        line = next(line for line in (_PROCESS / "status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024
