"""What a trainer writes into nnU-Net's log when a training starts: how it computes, and whether it can end well."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunetv2_lightnets.files import last_line
from nnunetv2_lightnets.nnunet.memory import memory_of
from nnunetv2_lightnets.ops import available_backends
from nnunetv2_lightnets.ops.selective_scan.dispatch import forced_backend

_FAST_SCANS = {"cuda": ("triton", "mamba_ssm"), "cpu": ("native",)}
_GIGABYTE = 2**30


def scan_backend(device_type: str) -> tuple[str, str | None]:
    """The backend of the selective scan on a device, and why it is a slow one; None if it is not.

    Raises:
        LightNetsError: the environment forces a backend that does not exist.
    """
    backends, forced = available_backends(), forced_backend()
    fast = [name for name in backends if name in _FAST_SCANS.get(device_type, ())]
    name = forced or next((name for name in fast if backends[name] is None), "torch")
    if name in fast:
        return name, None
    if forced:
        return name, "it is forced"
    return name, "; ".join(f"{name}: {backends[name]}" for name in fast) or f"there is no faster one for {device_type}"


def scan_notice(network: nn.Module, device: torch.device) -> str | None:
    """Which backend computes the selective scans of a network; None if it has none."""
    if not any(name.rpartition(".")[2].startswith("A_log") for name, _ in network.named_parameters()):
        return None
    name, slow = scan_backend(device.type)
    if slow is None:
        return f"selective scan on {device.type}: backend {name!r}"
    return (
        f"WARNING: selective scan on {device.type}: backend {name!r}, which is many times slower than the one meant "
        f"for this device ({slow}); nnUNetv2_lightnets doctor says what to do"
    )


def memory_notice(trainer: Any) -> str | None:
    """A warning that a training step will not fit into the device's memory; None if it will, or if nobody knows.

    The step is counted and not run, see :mod:`nnunetv2_lightnets.nnunet.memory`; on CUDA under mixed precision.
    """
    device: torch.device = trainer.device
    try:
        available = device_memory(device)
        if available is None:
            return None
        mixed = torch.autocast("cpu", dtype=torch.float16, enabled=device.type == "cuda")
        with torch.random.fork_rng(devices=[]), mixed:
            needed = memory_of(trainer).total
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
