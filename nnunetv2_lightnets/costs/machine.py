"""What the numbers were measured with."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from nnunetv2_lightnets import __version__
from nnunetv2_lightnets.ops import available_backends


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured with."""
    described = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": _total_memory(),
        "system": platform.platform(terse=True),
        "device": device.type,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "nnunetv2_lightnets": __version__,
        "scan backends": [name for name, reason in available_backends().items() if reason is None],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described |= {"GPU": properties.name, "GPU memory": properties.total_memory, "CUDA": torch.version.cuda}
    return described


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
