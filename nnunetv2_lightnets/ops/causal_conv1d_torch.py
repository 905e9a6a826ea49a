"""The causal convolution by torch's operations, on any device: shifted multiply-adds.

They keep channels-last memory as it is where torch's own convolution would transpose it. Arguments as in
``causal_conv1d.py``; results in the compute dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_lightnets.ops.tensors import compute_dtype


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """The convolution (B, D, L)."""
    dtype = compute_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    out = x * weight[:, -1:]
    if bias is not None:
        out += bias.to(dtype)[:, None]
    for shift in range(1, min(weight.shape[1], x.shape[2])):
        out[:, :, shift:].addcmul_(x[:, :, :-shift], weight[:, -1 - shift, None])
    return F.silu(out, inplace=True) if silu else out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias; the value before SiLU is computed again."""
    dtype = compute_dtype(x)
    grad, x, weight = grad.to(dtype), x.to(dtype), weight.to(dtype)
    if silu:
        before = forward(x, weight, bias, silu=False)
        sigmoid = torch.sigmoid(before)
        grad = grad * sigmoid * (1 + before * (1 - sigmoid))
    dx = grad * weight[:, -1:]
    dweight = torch.zeros_like(weight)
    dweight[:, -1] = (grad * x).sum((0, 2))
    for shift in range(1, min(weight.shape[1], x.shape[2])):
        dx[:, :, :-shift].addcmul_(grad[:, :, shift:], weight[:, -1 - shift, None])
        dweight[:, -1 - shift] = (grad[:, :, shift:] * x[:, :, :-shift]).sum((0, 2))
    return dx, dweight, None if bias is None else grad.sum((0, 2))
