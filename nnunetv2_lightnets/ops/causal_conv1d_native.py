"""The causal convolution on CPUs, in C (``csrc/conv_kernel.c``, see ``native_library.py``).

Arguments as in ``causal_conv1d.py``, which checks them and asks :func:`takes` first.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from nnunetv2_lightnets.ops import native_library as lib
from nnunetv2_lightnets.ops.selective_scan.record import CHUNK
from nnunetv2_lightnets.ops.tensors import compute_dtype

WIDEST_KERNEL = CHUNK + 1  # its tiles overlap by one chunk at most


def takes(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor | None = None) -> bool:
    """Whether the kernel is there and computes this convolution."""
    return (
        x.is_cpu
        and weight.shape[1] <= WIDEST_KERNEL
        and lib.unavailable() is None
        and lib.unreadable(("x", "weight", "bias", "grad"), (x, weight, bias, grad)) is None
    )


def _arguments(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Any:
    """The convolution in the form that C takes: pointers, so whoever uses it keeps the tensors alive."""
    batch, channels, length = x.shape
    return lib.ConvStruct(
        batch=batch,
        channels=channels,
        length=length,
        width=weight.shape[1],
        silu=silu,
        threads=torch.get_num_threads(),
        x=lib.describe(x),
        weight=lib.pointer(weight),
        bias=lib.pointer(bias),
    )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """The convolution (B, D, L), in the dtype and memory layout of ``x``."""
    dtype = compute_dtype(x)
    x, weight = lib.resolved(x), lib.dense(weight, dtype)
    bias = None if bias is None else lib.dense(bias, dtype)
    y = lib.new_like(x)
    arguments = _arguments(x, weight, bias, silu)
    arguments.y = lib.describe(y)
    lib.check_status(lib.library().ln_conv_forward(ctypes.byref(arguments), lib.DTYPES[dtype]))
    return y


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias (None where the bias is None), each in the dtype of its argument."""
    dtype = compute_dtype(x)
    x, grad, dense_weight = lib.resolved(x), lib.resolved(grad), lib.dense(weight, dtype)
    dense_bias = None if bias is None else lib.dense(bias, dtype)
    dx, dweight = lib.new_like(x), torch.empty_like(dense_weight)
    dbias = None if dense_bias is None else torch.empty_like(dense_bias)
    arguments = _arguments(x, dense_weight, dense_bias, silu)
    arguments.grad_y, arguments.dx = lib.describe(grad), lib.describe(dx)
    arguments.dweight, arguments.dbias = lib.pointer(dweight), lib.pointer(dbias)
    lib.check_status(lib.library().ln_conv_backward(ctypes.byref(arguments), lib.DTYPES[dtype]))
    return dx, dweight.to(weight.dtype), dbias if bias is None or dbias is None else dbias.to(bias.dtype)
