"""What all operators do with tensors: the dtype they compute in, and the memory layout of their results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Counting:
    """Whether tensors without memory on a CPU stand for those on a GPU: there, their bytes are counted."""

    for_gpu = False


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Code takes the ways that it has for GPUs, for tensors on a CPU that are only counted."""
    before, _Counting.for_gpu = _Counting.for_gpu, True
    try:
        yield
    finally:
        _Counting.for_gpu = before


def device_type(x: Tensor) -> str:
    """The type of the device that ``x`` is on, or stands for."""
    return "cuda" if _Counting.for_gpu else x.device.type


def on_cpu(x: Tensor) -> bool:
    """Whether code is to take the ways that are fast on CPUs."""
    return device_type(x) == "cpu"


def compute_dtype(x: Tensor) -> torch.dtype:
    """Float64 for float64, else float32: half-precision inputs accumulate in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def in_layout_of(like: Tensor, result: Tensor) -> Tensor:
    """``result`` in the dtype and memory layout of ``torch.empty_like(like)``, copied only where it is not so."""
    strides = like.stride() if like.is_contiguous() else torch.empty_like(like, device="meta").stride()
    if result.dtype == like.dtype and result.stride() == strides:
        return result
    return torch.empty_like(like).copy_(result)


def in_one_line(error: Exception) -> str:
    """An error's type and the first line of its text; those of CUDA go on for many."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
