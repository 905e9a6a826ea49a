"""Instance norm of images and volumes, in the way that is fastest for the device and the layout in memory.

In value it is torch's own. On a CPU that takes twice (forward) to five times (backward) as long as what is taken here,
and copies what has its channels last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_lightnets.networks.layers import CHANNELS_LAST
from nnunetv2_lightnets.networks.recompute import is_recorded
from nnunetv2_lightnets.ops.tensors import on_cpu


def instance_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``x`` (B, C, *spatial) with mean 0 and variance 1 in each image and channel, then scaled and shifted per channel.

    A single voxel becomes the offset.
    """
    if not on_cpu(x):
        # The function behind torch's layer; the layer refuses a single voxel.
        return torch.instance_norm(x, weight, bias, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)
    if _channels_are_last(x) and not torch.compiler.is_compiling() and not is_recorded():
        y: Tensor = _NormOfEachImage.apply(x, weight, bias, eps)
        return y
    return torch.group_norm(x, x.shape[1], weight, bias, eps)


class InstanceNorm(nn.Module):
    """Instance norm with scale and offset, of images and volumes."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (B, C, *spatial) per sample and channel."""
        return instance_norm(x, self.weight, self.bias, self.eps)


def _channels_are_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim])


class _NormOfEachImage(torch.autograd.Function):
    """The batch norm of each image, channels last.

    Torch's group norm is less exact in this layout, and its backward pass takes eight times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        images = [
            torch.native_batch_norm(image, weight, bias, None, None, True, 0.0, eps) for image in torch.split(x, 1)
        ]
        y, mean, rstd = (_joined(results) for results in zip(*images, strict=True))
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        asked = [ctx.needs_input_grad[0], *(weight is not None and needed for needed in ctx.needs_input_grad[1:3])]
        grad = gradients[0].contiguous(memory_format=CHANNELS_LAST[x.ndim])
        images = [
            torch.ops.aten.native_batch_norm_backward(*image, weight, None, None, *statistics, True, ctx.eps, asked)
            for image, statistics in zip(
                zip(torch.split(grad, 1), torch.split(x, 1), strict=True),
                zip(mean.view(x.shape[:2]), rstd.view(x.shape[:2]), strict=True),
                strict=True,
            )
        ]
        grad_x, grad_weight, grad_bias = (
            list(results) if needed else None for results, needed in zip(zip(*images, strict=True), asked, strict=True)
        )
        return (
            None if grad_x is None else _joined(grad_x),
            None if grad_weight is None else torch.stack(grad_weight).sum(0),
            None if grad_bias is None else torch.stack(grad_bias).sum(0),
            None,
        )


def _joined(images: Sequence[Tensor]) -> Tensor:
    return images[0] if len(images) == 1 else torch.cat(list(images))
