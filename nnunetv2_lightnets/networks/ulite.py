"""U-Lite: an encoder and a decoder of axial depthwise convolutions, in 2D as published, in 3D lifted by this project.

Paper: Dinh et al., "1M parameters are enough? A lightweight CNN-based model for medical image segmentation"
(APSIPA ASC 2023, arXiv:2306.16103). Repository: https://github.com/duong-db/U-Lite, which names no licence: this file
was written from the description of the architecture, no line of it comes from there.

Published are 2D, 3 input channels, 1 output, 878,417 parameters. The 3D network is this project's own: an axial
convolution has three kernels instead of two, and the dense stem is 3 voxels wide instead of 7, since a dense 7x7x7
would cost more than half of the whole network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks.depthwise import AxialDepthwiseConv, sum_of_axes
from nnunetv2_lightnets.networks.inference import fold_norm, norm_as_affine
from nnunetv2_lightnets.networks.layers import (
    CONVOLUTION,
    POINTWISE,
    BatchNorm,
    Convolution,
    channels_last_on_cpu,
    checked_strides,
    max_pool,
    pointwise_convolution,
    upsample_nearest,
)
from nnunetv2_lightnets.networks.padding import crop_to, pad_to_multiple, total_stride
from nnunetv2_lightnets.networks.recompute import is_computed_again, recomputed
from nnunetv2_lightnets.networks.registry import register_network

DILATIONS = (1, 2, 3)  # of the bottleneck's axial convolutions, whose kernel is 3 (paper, section II-C)
DEFAULT_STEM = {2: 7, 3: 3}  # 7 as published
Activation: TypeAlias = Callable[[Tensor], Tensor]
WIDEST_MERGED_ON_CPU = 3  # axial kernels that are one convolution in prediction, see AxialDepthwise.prepared


class AxialDepthwise(nn.Module):
    """``x`` plus, for each axis, a depthwise convolution of ``x`` along that axis alone."""

    def __init__(self, channels: int, kernel_size: int, spatial_dims: int, dilation: int = 1) -> None:
        super().__init__()
        convolution = nn.Conv2d if spatial_dims == 2 else AxialDepthwiseConv
        self.axes = nn.ModuleList()
        for axis in range(spatial_dims):
            kernel: Any = tuple(kernel_size if other == axis else 1 for other in range(spatial_dims))
            padding: Any = tuple(dilation * (size // 2) for size in kernel)
            self.axes.append(
                convolution(channels, channels, kernel, padding=padding, dilation=dilation, groups=channels)
            )

    def forward(self, x: Tensor, unread: bool = False) -> Tensor:
        """``x`` (B, C, *spatial) -> the same shape; ``unread`` as in :func:`sum_of_axes`."""
        return sum_of_axes(x, list(self.axes), unread)

    def prepared(self, norm: nn.Module | None = None) -> nn.Module:
        """The same for prediction, and batch norm ``norm`` after it.

        ``x`` itself becomes part of a kernel. Kernels of 3 voxels merge into one. So do those of 7 in 2D, except on a
        CPU, where 49 products in one convolution took up to twice as long as 14 in two. In 3D 343 never pay.
        """
        axes: list[Any] = list(copy.deepcopy(self.axes))
        size, dims = max(axes[0].kernel_size), len(axes)
        on_cpu = axes[0].weight.device.type == "cpu"
        if size <= WIDEST_MERGED_ON_CPU or (dims == 2 and not on_cpu):
            kernels = [_cross(axes)]
        else:
            kernels = axes
            kernels[0].weight[_center(kernels[0])] += 1.0
        if norm is not None:
            scale, shift = norm_as_affine(norm)
            for kernel in kernels:
                kernel.weight *= scale.view(-1, *[1] * (dims + 1))
                kernel.bias *= scale
            kernels[0].bias += shift
        return SumOfConvolutions(kernels) if len(kernels) > 1 else cast(nn.Module, kernels[0])


def _cross(axes: Sequence[Any]) -> Any:
    """One depthwise convolution that does what AxialDepthwise does; its kernel is a cross and zero elsewhere."""
    channels, size, dims, dilation = axes[0].in_channels, max(axes[0].kernel_size), len(axes), axes[0].dilation[0]
    cross = CONVOLUTION[dims](
        channels, channels, size, padding=dilation * (size // 2), dilation=dilation, groups=channels
    ).to(axes[0].weight)
    cross.weight.zero_()
    cross.weight[_center(cross)] = 1.0
    for axis in axes:
        around = [(size - k) // 2 for k in reversed(axis.kernel_size) for _ in range(2)]
        cross.weight += F.pad(axis.weight, around)
    cross.bias = nn.Parameter(torch.stack([axis.bias for axis in axes]).sum(0))
    return cross


def _center(convolution: Convolution) -> tuple[Any, ...]:
    return (..., *(size // 2 for size in convolution.kernel_size))


class SumOfConvolutions(nn.Module):
    """The sum of several convolutions of ``x``, for prediction only: it adds in place."""

    def __init__(self, convolutions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, *spatial) -> the same shape."""
        out: Tensor = self.convolutions[0](x)
        for convolution in self.convolutions[1:]:
            out += convolution(x)
        return out


class EncoderStage(nn.Module):
    """Axial convolution and norm, which are the skip connection; then a pointwise convolution and pooling."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int, spatial_dims: int, stride: Sequence[int]):
        super().__init__()
        self.stride = tuple(stride)
        self.axial: nn.Module = AxialDepthwise(channels, kernel_size, spatial_dims)
        self.norm: nn.Module = BatchNorm(channels)
        self.pointwise = POINTWISE[spatial_dims](channels, out_channels, 1)

    def forward(self, before: Activation, x: Tensor) -> tuple[Tensor, Tensor]:
        """``before`` of ``x`` (B, C, *spatial) -> (B, C', *spatial / stride), and the skip connection like ``x``."""
        skip: Tensor = self.norm(recomputed(self.mixed, before, x))
        # The largest voxel stays the largest with an offset, which few voxels get so.
        pooled = max_pool(pointwise_convolution(skip, self.pointwise.weight), self.stride)
        assert self.pointwise.bias is not None
        return pooled + self.pointwise.bias.to(pooled.dtype).view(-1, *[1] * (x.ndim - 2)), skip

    def mixed(self, before: Activation, x: Tensor) -> Tensor:
        """The first step."""
        return cast(Tensor, self.axial(before(x), *self._unread()))

    def _unread(self) -> list[bool]:
        return [is_computed_again(self.mixed)] if isinstance(self.axial, AxialDepthwise) else []

    def prepare_for_inference_(self) -> None:
        """The norm becomes part of the axial convolution."""
        assert isinstance(self.axial, AxialDepthwise)
        self.axial, self.norm = self.axial.prepared(self.norm), nn.Identity()


class Bottleneck(nn.Module):
    """Four branches of a quarter of the channels: the identity, and axial convolutions of growing dilation."""

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        quarter = channels // (1 + len(DILATIONS))
        self.reduce = POINTWISE[spatial_dims](channels, quarter, 1)
        self.branches = nn.ModuleList(AxialDepthwise(quarter, 3, spatial_dims, dilation) for dilation in DILATIONS)
        self.norm: nn.Module = BatchNorm(channels)
        self.expand = POINTWISE[spatial_dims](channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, *spatial) -> the same shape."""
        x = self.reduce(x)
        x = torch.cat([x, *(branch(x) for branch in self.branches)], dim=1)
        return F.gelu(self.expand(self.norm(x)))

    def prepare_for_inference_(self) -> None:
        """Each branch becomes one convolution, the norm part of the pointwise convolution that follows it."""
        branches: list[Any] = list(self.branches)
        self.branches = nn.ModuleList(branch.prepared() for branch in branches)
        scale, shift = norm_as_affine(self.norm)
        weight = self.expand.weight  # (C', C, *ones)
        assert self.expand.bias is not None
        self.expand.bias += weight.flatten(1) @ shift
        weight *= scale.view(1, -1, *[1] * (weight.ndim - 2))
        self.norm = nn.Identity()


class DecoderStage(nn.Module):
    """Nearest upsampling and the skip connection; then pointwise, norm, axial and pointwise convolution, and GELU.

    In two parts: between them is what is kept for the backward pass, so that no axial convolution is computed again.
    """

    def __init__(
        self, channels: int, out_channels: int, kernel_size: int, spatial_dims: int, stride: Sequence[int]
    ) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.reduce = POINTWISE[spatial_dims](channels + out_channels, out_channels, 1)
        self.norm = BatchNorm(out_channels)
        self.axial = AxialDepthwise(out_channels, kernel_size, spatial_dims)
        self.pointwise = POINTWISE[spatial_dims](out_channels, out_channels, 1)

    def mixed(self, before: Activation, x: Tensor, skip: Tensor) -> Tensor:
        """``x`` = ``before`` of the argument (B, C, *spatial) and ``skip`` -> what :meth:`activated` takes."""
        x = before(x)
        if self.training:
            weight, deep = self.reduce.weight, x.shape[1]  # as in PreparedDecoderStage
            reduced = pointwise_convolution(skip, weight[:, deep:])
            reduced += upsample_nearest(pointwise_convolution(x, weight[:, :deep], self.reduce.bias), self.stride)
        else:
            reduced = self.reduce(torch.cat([upsample_nearest(x, self.stride), skip], dim=1))
        return cast(Tensor, self.axial(self.norm(reduced), unread=is_computed_again(self.mixed)))

    def activated(self, mixed: Tensor) -> Tensor:
        """The other steps; the result has the skip connection's shape."""
        return F.gelu(self.pointwise(mixed))

    def prepared(self) -> PreparedDecoderStage:
        """The same for prediction."""
        reduce = fold_norm(self.reduce, self.norm)
        return PreparedDecoderStage(reduce, self.axial.prepared(), self.pointwise, self.stride)


class PreparedDecoderStage(nn.Module):
    """A decoder stage whose first pointwise convolution sees the deep channels before they are upsampled.

    Copying voxels and mixing channels commute, so the deep half of that convolution runs on fewer voxels, and the
    channels need not be laid side by side.
    """

    def __init__(self, reduce: Convolution, axial: nn.Module, pointwise: nn.Module, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)
        deep = reduce.in_channels - reduce.out_channels
        self.reduce_deep, self.reduce_skip = copy.deepcopy(reduce), copy.deepcopy(reduce)
        self.reduce_deep.weight = nn.Parameter(reduce.weight[:, :deep])
        self.reduce_deep.bias = None  # the skip connection's half adds it
        self.reduce_skip.weight = nn.Parameter(reduce.weight[:, deep:])
        self.axial = axial
        self.pointwise = pointwise

    def mixed(self, before: Activation, x: Tensor, skip: Tensor) -> Tensor:
        """As of :class:`DecoderStage`."""
        reduced = self.reduce_skip(skip)
        reduced += upsample_nearest(self.reduce_deep(before(x)), self.stride)
        return cast(Tensor, self.axial(reduced))

    def activated(self, mixed: Tensor) -> Tensor:
        """As of :class:`DecoderStage`."""
        return F.gelu(self.pointwise(mixed))


class Decoder(nn.Module):
    """All decoder stages and the head.

    There is one output whatever ``deep_supervision`` is set to.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        kernel_size: int,
        spatial_dims: int,
        strides: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.deep_supervision = False
        steps = zip(channels[:0:-1], channels[-2::-1], reversed(strides), strict=True)
        self.stages = nn.ModuleList(
            DecoderStage(deep, shallow, kernel_size, spatial_dims, stride) for deep, shallow, stride in steps
        )
        self.seg_layers = nn.ModuleList([POINTWISE[spatial_dims](channels[0], num_classes, 1)])

    def forward(self, x: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """``x`` from the bottleneck and the skip connections from fine to coarse -> logits (B, classes, *spatial)."""
        before: Activation = nn.Identity()
        for stage, skip in zip(self.stages, reversed(skips), strict=True):
            assert isinstance(stage, DecoderStage | PreparedDecoderStage)
            x, before = recomputed(stage.mixed, before, x, skip), stage.activated
        return recomputed(self._head, before, x)

    def _head(self, before: Activation, x: Tensor) -> Tensor:
        logits: Tensor = self.seg_layers[0](before(x))
        return logits


@register_network("ulite", spatial_dims=(2, 3))
class ULite(nn.Module):
    """U-Lite.

    Args:
        spatial_dims: 2 (as published) or 3 (this project's lift).
        input_channels: channels of the input; 3 as published.
        num_classes: channels of the logits; 1 as published.
        deep_supervision: must be False, U-Lite has one output.
        channels: of the stem and after each encoder stage; the last is a multiple of 4.
        kernel_size: of the axial convolutions along their axis, odd.
        stem_kernel_size: of the dense first convolution, odd; 7 in 2D and 3 in 3D by default.
        strides: of the encoder stages' pooling, per axis, e.g. ((1, 2, 2), ...); 2 everywhere by default.

    Raises:
        LightNetsError: if a setting does not fit.
    """

    def __init__(
        self,
        *,
        spatial_dims: int,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        channels: Sequence[int] = (16, 32, 64, 128, 256, 512),
        kernel_size: int = 7,
        stem_kernel_size: int | None = None,
        strides: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        if len(channels) < 2 or channels[-1] % (1 + len(DILATIONS)):
            raise LightNetsError(
                f"U-Lite's channels must be at least two, the last a multiple of {1 + len(DILATIONS)} (the branches "
                f"of its bottleneck), got {tuple(channels)}"
            )
        stem_kernel_size = stem_kernel_size or DEFAULT_STEM[spatial_dims]
        for label, size in (("kernel_size", kernel_size), ("stem_kernel_size", stem_kernel_size)):
            if size < 1 or size % 2 == 0:
                raise LightNetsError(f"U-Lite's {label} must be odd, got {size}")
        strides = checked_strides("U-Lite", strides, len(channels) - 1, spatial_dims)
        self.total_stride = total_stride(strides)
        self.stem = CONVOLUTION[spatial_dims](
            input_channels, channels[0], stem_kernel_size, padding=stem_kernel_size // 2
        )
        self.encoder = nn.ModuleList(
            EncoderStage(shallow, deep, kernel_size, spatial_dims, stride)
            for shallow, deep, stride in zip(channels[:-1], channels[1:], strides, strict=True)
        )
        self.bottleneck = Bottleneck(channels[-1], spatial_dims)
        self.decoder = Decoder(channels, num_classes, kernel_size, spatial_dims, strides)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, *spatial) of any size -> logits (B, classes, *spatial)."""
        spatial = x.shape[2:]
        x = self.stem(channels_last_on_cpu(pad_to_multiple(x, self.total_stride)))
        skips: list[Tensor] = []
        for stage in self.encoder:
            x, skip = stage(F.gelu if skips else nn.Identity(), x)
            skips.append(skip)
        return crop_to(self.decoder(self.bottleneck(F.gelu(x)), skips), spatial)

    def prepare_for_inference_(self) -> None:
        """Rewrite this network for prediction, see ``prepare_for_inference``."""
        encoder: list[Any] = list(self.encoder)
        decoder: list[Any] = list(self.decoder.stages)
        for stage in encoder:
            stage.prepare_for_inference_()
        self.bottleneck.prepare_for_inference_()
        self.decoder.stages = nn.ModuleList(stage.prepared() for stage in decoder)

    def from_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict under this network's names; keys unknown here stay as they are."""
        depth = len(self.encoder)
        ours = {
            "conv_in": "stem",
            "conv_out": "decoder.seg_layers.0",
            "b5.pw1": "bottleneck.reduce",
            "b5.bn": "bottleneck.norm",
            "b5.pw2": "bottleneck.expand",
        }
        for branch in range(len(DILATIONS)):
            ours[f"b5.dw{branch + 1}"] = f"bottleneck.branches.{branch}"
        for level in range(depth):
            for theirs, own in (("bn", "norm"), ("pw", "pointwise"), ("dw", "axial")):
                ours[f"e{level + 1}.{theirs}"] = f"encoder.{level}.{own}"
            for theirs, own in (("bn", "norm"), ("pw", "reduce"), ("pw2", "pointwise"), ("dw", "axial")):
                ours[f"d{level + 1}.{theirs}"] = f"decoder.stages.{depth - 1 - level}.{own}"
        for theirs, own in list(ours.items()):  # those that are axial have two convolutions
            ours |= {f"{theirs}.dw_h": f"{own}.axes.0", f"{theirs}.dw_w": f"{own}.axes.1"}
        renamed = {}
        for key, value in state_dict.items():
            module, _, leaf = key.rpartition(".")
            renamed[f"{ours.get(module, module)}.{leaf}"] = value
        return renamed
