"""What the two purely convolutional networks, U-Lite and UltraLightUNet, are built from, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_lightnets.errors import LightNetsError

Convolution: TypeAlias = nn.Conv2d | nn.Conv3d
CONVOLUTION: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes of a tensor
_INTERPOLATION = {4: "bilinear", 5: "trilinear"}


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
        return super().forward(x)


def channels_last_on_cpu(x: Tensor) -> Tensor:
    """A copy of ``x`` (B, C, *spatial) with its channels last in memory if it is on a CPU, else ``x``.

    There depthwise convolutions, pooling and resampling run 2 to 20 times faster so, in training too, and every layer
    hands the format on (measured: benchmarks/light_cnns_cpu.py). No GPU was at hand to measure.
    """
    if x.device.type != "cpu":
        return x
    # A clone, since contiguous() takes a single channel for being last already and the first layer then does not.
    return x.clone(memory_format=_CHANNELS_LAST[x.ndim])


def max_pool(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Max pooling of ``x`` (B, C, *spatial) with a window of ``stride`` voxels, not overlapping."""
    if all(s == 1 for s in stride):
        return x
    pool = F.max_pool2d if x.ndim == 4 else F.max_pool3d
    return pool(x, tuple(stride), tuple(stride))


def upsample_linear(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Bi- or trilinear upsampling of ``x`` (B, C, *spatial) by ``stride`` along each axis."""
    if all(s == 1 for s in stride):
        return x
    return F.interpolate(x, scale_factor=[float(s) for s in stride], mode=_INTERPOLATION[x.ndim], align_corners=False)


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


def refuse_deep_supervision(network: str, deep_supervision: bool) -> None:
    """Raise LightNetsError if deep supervision is asked of a network that was published with one output."""
    if deep_supervision:
        raise LightNetsError(
            f"{network} has one output, deep_supervision must be False; train it with its own trainer, "
            "or with nnUNetTrainerNoDeepSupervision"
        )
