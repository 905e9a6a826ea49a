"""Bytes that a process can still get: from a GPU, or from this machine within the limits of its control groups.

A container, or a job of a cluster's scheduler, is a control group with a limit of its own, which the system's file of
free memory does not show: what exceeds it is killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

_ROOT = Path("/")
# Version of control groups -> their folder, files of limit and usage, and what pages of files are called: these can be
# dropped, those that are read often, too.
_FILES = {
    2: ("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    1: (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still get on a device for its tensors; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps of memory that it has freed is free for the next tensors.
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_main_memory() if device.type == "cpu" else None


def available_main_memory(root: Path = _ROOT) -> int | None:
    """The same of the main memory: the least of what the machine and all control groups around this process leave."""
    left = [*_left_by_machine(root), *_left_by_groups(root)]
    return min(left) if left else None


def _left_by_machine(root: Path) -> Iterator[int]:
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024
    elif hasattr(os, "sysconf"):
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_by_groups(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        version = 2 if number == "0" and not controllers else 1
        if version == 2 or "memory" in controllers.split(","):
            top = root / _FILES[version][0]
            group = top / path.lstrip("/")
            # In a container, the path may be that outside of it: then only the top is to be seen.
            for folder in (group, *group.parents):
                yield from _left_by_group(folder, *_FILES[version][1:])
                if folder == top:
                    break


def _left_by_group(folder: Path, limit: str, usage: str, droppable: tuple[str, ...]) -> Iterator[int]:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        if most == "max":
            return
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield max(0, int(most) - used + sum(int(stat.get(pages, 0)) for pages in droppable))
    except (OSError, ValueError):  # there is no such group here, or it has no limit
        return
