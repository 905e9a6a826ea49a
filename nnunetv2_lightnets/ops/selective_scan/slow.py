"""What users hear where a scan is slow: the backend, why no faster one runs, what that costs here, and the remedy."""

from __future__ import annotations

import torch

from nnunetv2_lightnets.ops.selective_scan.measured import slowdown

# Words of a reason for which Triton does not run, and what mends it. The first that fits is taken.
_REMEDIES = (
    ("ROCm", "on AMD's GPUs take a network without a scan, such as nnUNetTrainerULite"),
    ("no C compiler", "install gcc (apt install gcc, dnf install gcc or conda install gcc) and start again"),
    ("no Python headers", "install Python's headers (apt install python3-dev or dnf install python3-devel)"),
    ("compute capability", "take a newer GPU, mamba-ssm (docs/installation.md), or a network without a scan"),
    ("no official build", "use Linux, or WSL on Windows"),
    ("Triton is not installed", "install torch for CUDA, with which Triton comes, or pip install triton"),
    ("OutOfMemory", "free memory of the GPU (nvidia-smi shows who has it) and start again"),
    ("a small", "please report this; until then take mamba-ssm (docs/installation.md) or a network without a scan"),
)
_ANY = "Triton comes with torch for CUDA on Linux, and needs a C compiler (gcc) the first time it runs: install both"
_ON_CPU = "install a wheel, or a C compiler, and then this package again"


def slow_scan(device: torch.device, refusals: str) -> tuple[str, str]:
    """What is to be said where backend "torch" scans on a device that is meant for a faster one, and the remedy.

    It measures how slow that is, which takes up to a second.

    Args:
        device: Where the scan computes.
        refusals: Why the faster backends do not run, with their names.
    """
    times = slowdown(device)
    measured = (
        "many times slower than the one meant for this device"
        if times is None
        else f"whose forward pass takes {times:,.0f} times as long as reading and writing its data once (measured here)"
    )
    what = f"selective scan on {device.type}: backend 'torch', {measured}; {refusals}"
    if device.type == "cpu":
        return what, _ON_CPU
    if device.type != "cuda":
        return what, "train with -device cpu, or take a network without a scan, such as nnUNetTrainerULite"
    return what, next((remedy for words, remedy in _REMEDIES if words in refusals), _ANY)
