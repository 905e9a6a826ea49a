"""Layers that several networks share, in 2D and 3D: batch norm, depthwise convolutions, pooling and upsampling.

Depthwise convolutions are torch's own in value; on a CPU they are computed in other ways, which are faster.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

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


class AxialDepthwiseConv(nn.Conv3d):
    """Depthwise convolution of a volume along one axis; its kernel is 1 along the other two.

    On a CPU the volume, channels last, is taken for a stack of images, without a copy. Torch's depthwise convolution of
    volumes takes 5 to 40 times longer, mostly in the backward pass (measured: benchmarks/light_cnns_cpu.py).
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, D, H, W) -> the same shape."""
        axis = self.kernel_size.index(max(self.kernel_size))
        return _Axis(axis, self).convolve(x, self.weight, self.bias) if on_cpu(x) else super().forward(x)


class _Axis:
    """A depthwise convolution of (B, C, *spatial) along one axis, as one of images that are views if channels are last.

    Along the last axis they are rows, not columns, which torch computes faster, but for the kernel's gradient.
    """

    def __init__(self, axis: int, convolution: Convolution) -> None:
        self.axis, self.rows = axis, axis == convolution.weight.ndim - 3
        self.size, self.step = max(convolution.kernel_size), max(convolution.dilation)

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of ``x`` with ``kernel``, of any shape."""
        padding, dilation = self._settings(self.rows)
        weight = self._kernel(kernel, self.rows)
        y = F.conv2d(self._images(x, self.rows), weight, bias, 1, padding, dilation, groups=len(weight))
        return y.movedim(1, -1).reshape(x.movedim(1, -1).shape).movedim(-1, 1)

    def input_gradient(self, grad: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
        """That of ``x``."""
        dx: Tensor = self._backward(grad, x, kernel, self.rows, [True, False, False])[0]
        return dx.movedim(1, -1).reshape(x.movedim(1, -1).shape).movedim(-1, 1)

    def parameter_gradients(self, grad: Tensor, x: Tensor, kernel: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Those of the kernel and, if asked for, of the bias."""
        _, dkernel, dbias = self._backward(grad, x, kernel, False, [False, True, bias])
        return dkernel.reshape(kernel.shape), dbias

    def _backward(self, grad: Tensor, x: Tensor, kernel: Tensor, rows: bool, wanted: list[bool]) -> Any:
        (padding, dilation), weight = self._settings(rows), self._kernel(kernel, rows)
        images, channels = (self._images(grad, rows), self._images(x, rows)), len(weight)
        backward = torch.ops.aten.convolution_backward
        return backward(*images, weight, [channels], [1, 1], padding, dilation, False, [0, 0], channels, wanted)

    def _images(self, x: Tensor, rows: bool) -> Tensor:
        """(N, C, side along the axis, voxels behind it), or (N, C, 1, side)."""
        last = x.movedim(1, -1)  # (B, *spatial, C)
        side, before = last.shape[self.axis + 1], last.shape[: self.axis + 1].numel()
        return last.reshape(before, *((1, side) if rows else (side, -1)), x.shape[1]).movedim(-1, 1)

    def _kernel(self, kernel: Tensor, rows: bool) -> Tensor:
        return kernel.reshape(len(kernel), 1, *((1, self.size) if rows else (self.size, 1)))

    def _settings(self, rows: bool) -> tuple[list[int], list[int]]:
        """Padding and dilation."""
        padding = self.step * (self.size // 2)
        return ([0, padding], [1, self.step]) if rows else ([padding, 0], [self.step, 1])


def sum_of_axes(x: Tensor, axes: Sequence[Any], unread: bool = False) -> Tensor:
    """``x`` (B, C, *spatial) plus ``axes`` of it: for each axis, in order, a depthwise convolution along it.

    With ``unread`` it is the last step of a block that is computed again, whose result nobody reads: what the backward
    pass needs is kept, and the numbers of the result mean nothing.
    """
    plain = not on_cpu(x) or torch.compiler.is_compiling() or is_recorded() or torch.is_autocast_enabled("cpu")
    if plain or not torch.is_grad_enabled():
        first, *others = axes
        out: Tensor = x + first(x)
        for convolution in others:
            out += convolution(x)
        return out
    offset = functools.reduce(torch.add, [axis.bias for axis in axes])
    ways = list(itertools.starmap(_Axis, enumerate(axes)))
    return cast(Tensor, _SumOfAxes.apply(x, offset, ways, unread, *(axis.weight for axis in axes)))


class _SumOfAxes(torch.autograd.Function):
    """Sum of an image or volume on a CPU and its convolutions along the axes, which writes it once for each axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, axes: list[_Axis], unread: bool, *kernels: Tensor) -> Tensor:
        ctx.save_for_backward(x, *kernels)
        ctx.axes = axes
        if unread:
            return x.new_zeros(()).expand(x.shape)
        first, *others = zip(axes, _with_voxel(kernels), strict=True)
        out = first[0].convolve(x, first[1], offset)
        for axis, kernel in others:
            out += axis.convolve(x, kernel, None)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, *kernels = ctx.saved_tensors
        wants_x, wants_offset, _, _, *wants_kernels = ctx.needs_input_grad
        grad = gradients[0].contiguous(memory_format=CHANNELS_LAST[x.ndim])
        grad_x = grad_offset = None
        grads: list[Tensor | None] = []
        for axis, kernel, wanted in zip(ctx.axes, _with_voxel(kernels), wants_kernels, strict=True):
            grads.append(None)
            if wanted:
                bias = wants_offset and grad_offset is None
                grads[-1], found = axis.parameter_gradients(grad, x, kernel, bias)
                grad_offset = found if bias else grad_offset
            if wants_x:
                dx = axis.input_gradient(grad, x, kernel)
                grad_x = dx if grad_x is None else grad_x.add_(dx)
        if wants_offset and grad_offset is None:
            grad_offset = grad.sum([0, *range(2, grad.ndim)])
        return grad_x, grad_offset, None, None, *grads


def _with_voxel(kernels: Sequence[Tensor]) -> list[Tensor]:
    """The kernels, of which the first one adds the voxel itself, too."""
    first = kernels[0].clone()
    first.flatten(1)[:, first[0].numel() // 2] += 1
    return [first, *kernels[1:]]


def depthwise_convolution(x: Tensor, convolution: Convolution) -> Tensor:
    """``convolution``, depthwise, cubic and without bias, of ``x`` (B, C, *spatial), with a fast backward pass."""
    if x.ndim != 5 or not on_cpu(x) or not torch.is_grad_enabled():
        return cast(Tensor, convolution(x))
    if not torch.is_autocast_enabled("cpu"):
        return cast(Tensor, _DepthwiseVolume.apply(x, convolution.weight))
    # In bfloat16 torch's gradient of the kernel is wrong where the volume is smaller than the kernel.
    with torch.autocast("cpu", enabled=False):
        return cast(Tensor, _DepthwiseVolume.apply(x.float(), convolution.weight.float()))


class _DepthwiseVolume(torch.autograd.Function):
    """Depthwise convolution of volumes on a CPU, whose gradients torch computes 3 to 10 times slower than this.

    The gradient of the input is a convolution with the mirrored kernel. That of the kernel is, for each of its slices,
    one of a convolution of images: those of the volume, against those of the gradient at the slice's distance.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv3d(x, weight, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        grad = gradients[0].contiguous(memory_format=torch.channels_last_3d)
        grad_x = grad_weight = None
        if wants_weight:
            slices = [_slice_gradient(x, grad, weight.shape[-1], shift) for shift in range(weight.shape[-1])]
            grad_weight = torch.stack(slices, dim=2)
        if wants_x:
            grad_x = F.conv3d(grad, weight.flip(2, 3, 4), padding=weight.shape[-1] // 2, groups=len(weight))
        return grad_x, grad_weight


def _slice_gradient(x: Tensor, grad: Tensor, size: int, number: int) -> Tensor:
    """Gradient (C, 1, size, size) of one slice of a depthwise kernel; ``x`` and ``grad`` are (B, C, D, H, W)."""
    channels, depth, distance = x.shape[1], x.shape[2], number - size // 2
    gradient = grad.new_zeros(channels, 1, size, size)
    n_images = depth - abs(distance)
    if n_images <= 0:
        return gradient
    for volume, grads in zip(x.movedim(2, 1), grad.movedim(2, 1), strict=True):  # (D, C, H, W)
        images = volume[max(0, distance) :][:n_images], grads[max(0, -distance) :][:n_images]
        gradient += conv2d_weight(  # type: ignore[no-untyped-call]
            images[0], gradient.shape, images[1], padding=size // 2, groups=channels
        )
    return gradient


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
