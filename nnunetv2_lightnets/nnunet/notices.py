"""What nnU-Net's user hears when a network starts: how it computes, and whether a training can end well."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from nnunetv2_lightnets.files import last_line
from nnunetv2_lightnets.nnunet.memory import NOBODY, memory_of
from nnunetv2_lightnets.ops.selective_scan.dispatch import (
    ENVIRONMENT_VARIABLE,
    FAST,
    ON_REQUEST,
    announced,
    fastest,
    forced_backend,
    refusal,
)
from nnunetv2_lightnets.ops.selective_scan.slow import slow_scan

_GIGABYTE = 2**30
_KINDS = {"A_log": "plain", "A_logs": "directional"}  # the parameter of a network that scans, and how it does


def scan_backend(device: torch.device, kind: str = "plain") -> tuple[str, tuple[str, str] | None]:
    """The backend of a kind of scan on a device, and, if it is a slow one, what is to be said of it and the remedy.

    Raises:
        LightNetsError: the environment forces a backend that does not exist.
    """
    forced, fast = forced_backend(), FAST.get(device.type, ())
    if forced in (*fast, ON_REQUEST):
        return forced, None
    if forced:
        what = f"selective scan on {device.type}: backend {forced!r}, which is slow; it is forced"
        return forced, (what, f"unset {ENVIRONMENT_VARIABLE}")
    reasons = {name: refusal(name, kind, device) for name in fast}
    if found := [name for name in fast if reasons[name] is None]:
        return fastest(found, kind, device), None
    refusals = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return "torch", slow_scan(device, refusals or f"there is no faster one for {device.type}")


def scans(network: nn.Module) -> list[str]:
    """The kinds of selective scans in a network."""
    parameters = {name.rpartition(".")[2] for name, _ in network.named_parameters()}
    return [kind for name, kind in _KINDS.items() if name in parameters]


def scan_notice(network: nn.Module, device: torch.device) -> str | None:
    """Which backend computes the selective scans of a network, a warning if it is a slow one; None if it has none.

    Where the notice warns, the scans themselves do so no more.
    """
    named: dict[str, list[str]] = {}
    for kind in scans(network):
        name, slow = scan_backend(device, kind)
        announced(device, name)
        if slow is not None:
            return f"WARNING: {slow[0]}. Remedy: {slow[1]}; nnUNetv2_lightnets doctor checks it"
        named.setdefault(name, []).append(kind)
    if not named:
        return None
    how = " (forced)" if forced_backend() else ""
    return f"selective scan on {device.type}: " + ", ".join(
        f"backend {name!r}{how}" + (f" for {' and '.join(its)} scans" if len(named) > 1 else "")
        for name, its in named.items()
    )


class _Terminal(logging.Handler):
    """Writes warnings on lines of their own beside a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{record.levelname}: {self.format(record)}", file=sys.stderr)


def show_warnings() -> None:
    """Show warnings of scans in the terminal, once they are given: nnU-Net sets up no log when it predicts."""
    logger = logging.getLogger("nnunetv2_lightnets")
    if not logger.hasHandlers():
        logger.addHandler(_Terminal(logging.WARNING))


def memory_notice(trainer: Any, watch: AbstractContextManager[object] = NOBODY) -> str | None:
    """A warning that a training step will not fit into the device's memory; None if it will, or if nobody knows.

    The step is counted and not run, see :mod:`nnunetv2_lightnets.nnunet.memory`; on CUDA under mixed precision.

    Args:
        trainer: About to train.
        watch: Entered while the step is counted.
    """
    device: torch.device = trainer.device
    try:
        available = device_memory(device)
        if available is None:
            return None
        mixed = torch.autocast("cpu", dtype=torch.float16, enabled=device.type == "cuda")
        with torch.random.fork_rng(devices=[]), mixed:
            needed = memory_of(trainer, watch).total
    except Exception as error:  # an estimate must not stop a training
        return f"the memory of a training step could not be estimated: {last_line(error)}"
    if needed <= available:
        return None
    patch = " x ".join(map(str, trainer.configuration_manager.patch_size))
    gigabytes = available / _GIGABYTE
    plan = f"-d {trainer.plans_manager.dataset_name} -tr {type(trainer).__name__} --memory {gigabytes:.0f}"
    return (
        f"WARNING: a training step on patches of {patch} with batch size {trainer.batch_size} takes about "
        f"{needed / _GIGABYTE:.1f} GB, and {device.type} has {gigabytes:.1f} GB. Take a smaller network (a trainer "
        f"ending in S or T), or plans that fit (nnUNetv2_lightnets plan {plan}), or a smaller batch size in the plans"
    )


def device_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has, or that this machine can still give to a training on a CPU; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
