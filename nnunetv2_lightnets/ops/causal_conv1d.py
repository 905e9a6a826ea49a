"""Depthwise causal convolution along a sequence, as in front of Mamba's selective scan."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """Convolve every channel with its own kernel that sees this token and the ones before.

    Args:
        x: (B, D, L), any strides; the output keeps its memory layout.
        weight: (D, K); ``weight[:, -1]`` meets the token itself.
        bias: (D,).
        activation: None or "silu".

    Returns:
        (B, D, L).
    """
    if activation not in (None, "silu"):
        raise LightNetsError(f"causal_conv1d: activation is {activation!r}; it must be None or 'silu'")
    length, width = x.shape[2], weight.shape[1]
    padded = F.pad(x, (width - 1, 0))
    out = padded[:, :, :length] * weight[:, :1]
    for tap in range(1, width):
        out = out + padded[:, :, tap : tap + length] * weight[:, tap, None]
    if bias is not None:
        out = out + bias[:, None]
    return F.silu(out) if activation else out
