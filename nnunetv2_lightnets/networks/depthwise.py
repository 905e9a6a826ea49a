"""Depthwise convolutions, torch's own in value; on a CPU they are computed in other ways, which are faster."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from nnunetv2_lightnets.networks.layers import CHANNELS_LAST, Convolution
from nnunetv2_lightnets.networks.recompute import is_recorded
from nnunetv2_lightnets.ops.tensors import on_cpu


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
