"""Layers that several networks share, in 2D and 3D: batch norm, pointwise convolutions, pooling and upsampling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks.recompute import is_recorded, moments_of_block
from nnunetv2_lightnets.ops.tensors import on_cpu

Convolution: TypeAlias = nn.Conv2d | nn.Conv3d
CONVOLUTION: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes of a tensor
LINEAR_INTERPOLATION = {2: "bilinear", 3: "trilinear"}


# Torch normalises channels that are last in vectors of channels; with few the other format and two copies are faster.
FEW_CHANNELS = 4


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of images and volumes that also trains where a channel holds a single value.

    One value per channel (a one-voxel bottleneck with batch size 1) has no variance; torch refuses it in training.
    Such a call normalises with the running statistics and leaves them as they are: what is seen in evaluation.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        """Every (B, C, *spatial) is accepted."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (B, C, *spatial) per channel."""
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if torch.is_grad_enabled() and 1 < x.shape[1] <= FEW_CHANNELS and _is_channels_last_on_cpu(x):
            return channels_last_on_cpu(self._normalised(x.contiguous()))
        return self._normalised(x)

    def _normalised(self, x: Tensor) -> Tensor:
        moments = moments_of_block()
        if self.training and moments is not None:
            return moments.batch_norm(x, self)
        return super().forward(x)


def channels_last_on_cpu(x: Tensor) -> Tensor:
    """A copy of ``x`` (B, C, *spatial) with its channels last in memory if it is on a CPU, else ``x``.

    There depthwise convolutions, pooling and resampling run 2 to 20 times faster so, in training too, and every layer
    hands the format on (measured: benchmarks/light_cnns_cpu.py). No GPU was at hand to measure.
    """
    if not on_cpu(x):
        return x
    # A clone, since contiguous() takes a single channel for being last already and the first layer then does not.
    return x.clone(memory_format=CHANNELS_LAST[x.ndim])


def _is_channels_last_on_cpu(x: Tensor) -> bool:
    traced = torch.compiler.is_compiling() or is_recorded()
    return on_cpu(x) and not x.is_contiguous() and not traced


def pointwise_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution of ``x`` (B, C, *spatial) with ``weight`` (C', C, *ones).

    Of volumes on a CPU it is a product of matrices, 3 to 7 times faster than torch's own.
    """
    if x.ndim == 4:
        return F.conv2d(x, weight, bias)
    if not on_cpu(x) or torch.compiler.is_compiling():
        return F.conv3d(x, weight, bias)
    return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


class PointwiseConv3d(nn.Conv3d):
    """1x1x1 convolution of volumes."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, D, H, W) -> (B, C', D, H, W)."""
        return pointwise_convolution(x, self.weight, self.bias)


POINTWISE: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: PointwiseConv3d}


def max_pool(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Max pooling of ``x`` (B, C, *spatial) with a window of ``stride`` voxels, not overlapping."""
    if all(s == 1 for s in stride):
        return x
    too_many = math.prod(stride) > 256  # voxels in a window, for one byte
    traced = torch.compiler.is_compiling() or is_recorded()  # Inductor keeps one byte by itself
    if not torch.is_grad_enabled() or too_many or traced:
        pool = F.max_pool2d if x.ndim == 4 else F.max_pool3d
        return pool(x, tuple(stride), tuple(stride))
    return cast(Tensor, _MaxPool.apply(x, tuple(stride)))


class _MaxPool(torch.autograd.Function):
    """Max pooling that keeps one byte per window, the place of its largest voxel; torch keeps eight, and the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: tuple[int, ...]) -> Tensor:
        aten = torch.ops.aten
        pool = aten.max_pool2d_with_indices if x.ndim == 4 else aten.max_pool3d_with_indices
        largest, index = pool(x, stride, stride)  # the index is that of the voxel in its image
        voxels = torch.arange(math.prod(x.shape[2:]), device=x.device).view(x.shape[2:])
        first, *others = _places(voxels, stride)
        index -= first
        place = torch.zeros_like(index, dtype=torch.uint8)
        for voxel in others:
            place += index >= (voxel - first).flatten()[0]
        ctx.save_for_backward(place)
        ctx.stride, ctx.shape, ctx.strides = stride, x.shape, torch.empty_like(x, device="meta").stride()
        return cast(Tensor, largest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (place,), (grad,) = ctx.saved_tensors, gradients
        grad_x = torch.empty_strided(ctx.shape, ctx.strides, dtype=grad.dtype, device=grad.device)
        if any(side % s for side, s in zip(ctx.shape[2:], ctx.stride, strict=True)):
            grad_x.zero_()  # voxels at the end belong to no window
        for number, voxels in enumerate(_places(grad_x, ctx.stride)):
            torch.mul(grad, place == number, out=voxels)
        return grad_x, None


def _places(x: Tensor, stride: tuple[int, ...]) -> list[Tensor]:
    """Views of ``x`` (..., *spatial): the first voxels of all windows, the second ones and so on, row by row."""
    sides = list(zip(x.shape[-len(stride) :], stride, strict=True))

    def voxels(*starts: int) -> Tensor:
        place: Any = (slice(start, side - side % s, s) for start, (side, s) in zip(starts, sides, strict=True))
        return x[(..., *place)]

    return list(itertools.starmap(voxels, itertools.product(*map(range, stride))))


def upsample_linear(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Bi- or trilinear upsampling of ``x`` (B, C, *spatial) by ``stride`` along each axis."""
    if all(s == 1 for s in stride):
        return x
    return F.interpolate(
        x, scale_factor=[float(s) for s in stride], mode=LINEAR_INTERPOLATION[x.ndim - 2], align_corners=False
    )


def upsample_nearest(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Nearest-neighbour upsampling of ``x`` (B, C, *spatial) by ``stride`` along each axis."""
    if all(s == 1 for s in stride):
        return x
    return F.interpolate(x, scale_factor=[float(s) for s in stride], mode="nearest")


def checked_strides(
    network: str, strides: Sequence[Sequence[int]] | None, n_downsamplings: int, spatial_dims: int
) -> tuple[tuple[int, ...], ...]:
    """``strides`` as tuples, or 2 along every axis where they are None.

    Raises:
        LightNetsError: if their number or their axes do not fit the network.
    """
    if strides is None:
        return ((2,) * spatial_dims,) * n_downsamplings
    checked = tuple(tuple(stride) for stride in strides)
    if len(checked) != n_downsamplings or any(len(s) != spatial_dims or min(s) < 1 for s in checked):
        raise LightNetsError(
            f"{network} in {spatial_dims}D takes {n_downsamplings} strides of {spatial_dims} positive integers each, "
            f"got {strides}"
        )
    return checked
