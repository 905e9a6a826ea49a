"""The causal convolution on CPUs, in C (``csrc/conv_kernel.c``, see ``native_library.py``)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.ops.native_library import (
    DTYPES,
    ConvStruct,
    check_status,
    dense,
    describe,
    library,
    new_like,
    pointer,
    resolved,
    unreadable,
)
from nnunetv2_lightnets.ops.selective_scan.record import CHUNK
from nnunetv2_lightnets.ops.tensors import compute_dtype

WIDEST_KERNEL = CHUNK + 1  # its tiles overlap by one chunk at most


def refuses(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernel cannot take this causal convolution, None if it can."""
    refusal = unreadable(("x", "weight", "bias"), (x, weight, bias))
    if refusal is None and x.dim() != 3:
        refusal = f"x has shape {tuple(x.shape)}, and it takes (B, D, L)"
    if refusal is None and (weight.dim() != 2 or weight.shape[0] != x.shape[1]):
        refusal = f"weight has shape {tuple(weight.shape)}, and it takes ({x.shape[1]}, K)"
    if refusal is None and not 1 <= weight.shape[1] <= WIDEST_KERNEL:
        refusal = f"weight has shape {tuple(weight.shape)}, and it takes a kernel size of 1 to {WIDEST_KERNEL}"
    if refusal is None and bias is not None and bias.shape != (x.shape[1],):
        refusal = f"bias has shape {tuple(bias.shape)}, and it takes ({x.shape[1]},)"
    return refusal


def _arguments(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Any:
    """The convolution in the form that C takes: pointers, so whoever uses it keeps the tensors alive."""
    refusal = refuses(x, weight, bias)
    if refusal:
        raise LightNetsError(f"native causal_conv1d: {refusal}")
    batch, channels, length = x.shape
    return ConvStruct(
        batch=batch,
        channels=channels,
        length=length,
        width=weight.shape[1],
        silu=silu,
        threads=torch.get_num_threads(),
        x=describe(x),
        weight=pointer(weight),
        bias=pointer(bias),
    )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Depthwise causal convolution, then SiLU if asked for.

    Args:
        x: (B, D, L), any strides; the output keeps its dtype and memory layout.
        weight: (D, K); ``weight[:, -1]`` meets the token itself.
        bias: (D,).
        silu: Whether to apply SiLU.

    Returns:
        (B, D, L).

    Raises:
        LightNetsError: If the library is not available or does not take the call.
    """
    dtype = compute_dtype(x)
    x, weight = resolved(x), dense(weight, dtype)
    bias = None if bias is None else dense(bias, dtype)
    arguments = _arguments(x, weight, bias, silu)
    y = new_like(x)
    arguments.y = describe(y)
    check_status(library().ln_conv_forward(ctypes.byref(arguments), DTYPES[dtype]))
    return y


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias (None where the bias is None), each in the dtype of its argument.

    Args:
        grad_y: Gradient of the output, (B, D, L).
        x: As in :func:`forward`, as are the others.
        weight: (D, K).
        bias: (D,).
        silu: Whether SiLU was applied.

    Raises:
        LightNetsError: If the library is not available or does not take the call.
    """
    dtype = compute_dtype(x)
    x, grad_y, dense_weight = resolved(x), resolved(grad_y), dense(weight, dtype)
    dense_bias = None if bias is None else dense(bias, dtype)
    arguments = _arguments(x, dense_weight, dense_bias, silu)
    refusal = unreadable(("grad_y",), (grad_y,))
    if refusal is None and grad_y.shape != x.shape:
        refusal = f"grad_y has shape {tuple(grad_y.shape)}, and x has {tuple(x.shape)}"
    if refusal:
        raise LightNetsError(f"native causal_conv1d, backward: {refusal}")
    dx, dweight = new_like(x), torch.empty_like(dense_weight)
    dbias = None if dense_bias is None else torch.empty_like(dense_bias)
    arguments.grad_y, arguments.dx = describe(grad_y), describe(dx)
    arguments.dweight, arguments.dbias = pointer(dweight), pointer(dbias)
    check_status(library().ln_conv_backward(ctypes.byref(arguments), DTYPES[dtype]))
    return dx, dweight.to(weight.dtype), dbias if bias is None or dbias is None else dbias.to(bias.dtype)
