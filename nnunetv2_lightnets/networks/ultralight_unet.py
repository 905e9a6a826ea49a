"""UltraLightUNet, published in 2D under the name MK-UNet: multi-kernel inverted residuals and grouped attention gates.

Paper: Rahman and Marculescu, "MK-UNet: Multi-kernel Lightweight CNN for Medical Image Segmentation" (ICCV 2025
workshops; its earlier version is "UltraLightUNet"). Repository: https://github.com/SLDGroup/MK-UNet (BSD-3-Clause).

The 2D networks are the published ones without their three dead heads (computed in every forward pass there, and
thrown away). The 3D code was never published: here the 2D network is lifted directly, every operation by its 3D
namesake, with the same channels. Variant M with 3 input channels has 1,438,083 parameters against the paper's 1.42 M
for "UltraLightUNet3D-M"; it is an approximation of that network, not a reproduction.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks.depthwise import depthwise_convolution
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
    upsample_linear,
)
from nnunetv2_lightnets.networks.padding import crop_to, pad_to_multiple, total_stride
from nnunetv2_lightnets.networks.recompute import recomputed
from nnunetv2_lightnets.networks.registry import register_network

VARIANTS: dict[str, tuple[int, ...]] = {
    "T": (4, 8, 16, 24, 32),
    "S": (8, 16, 32, 48, 80),
    "base": (16, 32, 64, 96, 160),
    "M": (32, 64, 128, 192, 320),
    "L": (64, 128, 256, 384, 512),
}
ATTENTION_RATIOS = (4, 8, 16, 16, 16)  # of the channel attentions, by the level of their channels, fine to coarse
SPATIAL_ATTENTION_KERNEL = 7


def _unbiased_convolution(
    spatial_dims: int, in_channels: int, out_channels: int, kernel_size: int = 1, groups: int = 1
) -> Convolution:
    convolution = POINTWISE if kernel_size == groups == 1 else CONVOLUTION
    return convolution[spatial_dims](
        in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False
    )


class DepthwiseBranch(nn.Module):
    """Depthwise convolution, norm and ReLU6: one branch of a multi-kernel block.

    A kernel of one voxel is a multiplication, and is computed as one: torch would run a convolution per channel.
    """

    def __init__(self, channels: int, kernel_size: int, spatial_dims: int) -> None:
        super().__init__()
        self.convolution = _unbiased_convolution(spatial_dims, channels, channels, kernel_size, groups=channels)
        self.norm = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, *spatial) -> the same shape."""
        return self.activated(self.convolved(x))

    def convolved(self, x: Tensor) -> Tensor:
        """The first step."""
        weight = self.convolution.weight
        return x * weight.transpose(0, 1) if weight[0].numel() == 1 else depthwise_convolution(x, self.convolution)

    def activated(self, x: Tensor) -> Tensor:
        """The others."""
        return F.relu6(self.norm(x), inplace=True)

    def prepared(self) -> nn.Module:
        """The same for prediction."""
        if self.convolution.weight[0].numel() > 1:
            return nn.Sequential(fold_norm(self.convolution, self.norm), nn.ReLU6(inplace=True))
        scale, shift = norm_as_affine(self.norm)
        return PreparedAffineBranch(scale * self.convolution.weight.flatten(), shift, self.convolution.weight.ndim)


class PreparedAffineBranch(nn.Module):
    """A branch of one-voxel kernels: scale and shift per channel, and ReLU6."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, ndim: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale.view(1, -1, *[1] * (ndim - 2)))
        self.register_buffer("shift", shift.view(1, -1, *[1] * (ndim - 2)))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, *spatial) -> the same shape."""
        return F.relu6(torch.addcmul(self.shift, x, self.scale), inplace=True)


class MultiKernelBlock(nn.Module):
    """Multi-kernel inverted residual (MKIR): expand, the sum of the depthwise branches, shuffle, project, and ``x``.

    The published block shuffles the channels before the projection. Shuffling the projection's columns instead
    gives the same and leaves the feature maps where they are.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_sizes: Sequence[int], expansion: int, spatial_dims: int
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.groups = math.gcd(hidden, out_channels)
        self.expand = _unbiased_convolution(spatial_dims, in_channels, hidden)
        self.expand_norm = BatchNorm(hidden)
        self.branches = nn.ModuleList(DepthwiseBranch(hidden, kernel, spatial_dims) for kernel in kernel_sizes)
        self.project = _unbiased_convolution(spatial_dims, hidden, out_channels)
        self.project_norm = BatchNorm(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = _unbiased_convolution(spatial_dims, in_channels, out_channels)

    @property
    def _branches(self) -> list[DepthwiseBranch]:
        return [cast(DepthwiseBranch, branch) for branch in self.branches]

    def unshuffled_projection(self) -> Tensor:
        """The projection's weight (C', C, *ones) for channels that were not shuffled."""
        weight = self.project.weight
        # (C', C, *ones), columns in shuffled order -> (C', C / g, g) -> (C', g, C / g) -> (C', C, *ones)
        return weight.reshape(len(weight), -1, self.groups).transpose(1, 2).reshape(weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, *spatial) -> (B, C', *spatial)."""
        # What is kept for the backward pass: the outputs of all convolutions. Norms and activations are recomputed.
        out: Tensor = self.project_norm(recomputed(self._mixed, *recomputed(self._convolved, self.expand(x))))
        out += self.shortcut(x)
        return out

    def _convolved(self, x: Tensor) -> list[Tensor]:
        hidden = F.relu6(self.expand_norm(x), inplace=True)
        return [branch.convolved(hidden) for branch in self._branches]

    def _mixed(self, *convolved: Tensor) -> Tensor:
        first, *others = (branch.activated(x) for branch, x in zip(self._branches, convolved, strict=True))
        return pointwise_convolution(sum(others, first), self.unshuffled_projection())

    def prepared(self) -> PreparedMultiKernelBlock:
        """The same for prediction."""
        branches: list[Any] = list(self.branches)
        project = copy.deepcopy(self.project)
        project.weight.copy_(self.unshuffled_projection())
        return PreparedMultiKernelBlock(
            fold_norm(self.expand, self.expand_norm),
            [branch.prepared() for branch in branches],
            fold_norm(project, self.project_norm),
            self.shortcut,
        )


class PreparedMultiKernelBlock(nn.Module):
    """A multi-kernel block whose norms are folded, and whose sums are made in place."""

    def __init__(
        self, expand: nn.Module, branches: Sequence[nn.Module], project: nn.Module, shortcut: nn.Module
    ) -> None:
        super().__init__()
        self.expand = expand
        self.branches = nn.ModuleList(branches)
        self.project = project
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, *spatial) -> (B, C', *spatial)."""
        hidden = F.relu6(self.expand(x), inplace=True)
        mixed = self.branches[0](hidden)
        for branch in self.branches[1:]:
            mixed += branch(hidden)
        out: Tensor = self.project(mixed)
        out += self.shortcut(x)
        return out


class ChannelAttention(nn.Module):
    """One weight per channel, from its mean and its maximum through the same two layers."""

    def __init__(self, channels: int, ratio: int, spatial_dims: int) -> None:
        super().__init__()
        hidden = max(1, channels // ratio)
        self.squeeze = _unbiased_convolution(spatial_dims, channels, hidden)
        self.excite = _unbiased_convolution(spatial_dims, hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, *spatial) -> weights (B, C, *ones)."""
        spatial = tuple(range(2, x.ndim))
        mean, maximum = x.mean(spatial, keepdim=True), x.amax(spatial, keepdim=True)
        return torch.sigmoid(self.excite(F.relu(self.squeeze(mean))) + self.excite(F.relu(self.squeeze(maximum))))


class SpatialAttention(nn.Module):
    """One weight per voxel, from the mean and the maximum over the channels."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        self.convolution = _unbiased_convolution(spatial_dims, 2, 1, SPATIAL_ATTENTION_KERNEL)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, *spatial) -> weights (B, 1, *spatial)."""
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return torch.sigmoid(self.convolution(channels_last_on_cpu(both)))


class AttentionGate(nn.Module):
    """Grouped attention gate (GAG): weighs the voxels of a skip connection by what the decoder looks for."""

    def __init__(self, channels: int, kernel_size: int, spatial_dims: int) -> None:
        super().__init__()
        inner = channels // 2
        groups = 1 if kernel_size == 1 else inner  # as published: a gate of 1x1 kernels is dense
        convolution = (POINTWISE if groups == 1 else CONVOLUTION)[spatial_dims]
        self.query = convolution(channels, inner, kernel_size, padding=kernel_size // 2, groups=groups)
        self.query_norm = BatchNorm(inner)
        self.key = convolution(channels, inner, kernel_size, padding=kernel_size // 2, groups=groups)
        self.key_norm = BatchNorm(inner)
        self.weigh = POINTWISE[spatial_dims](inner, 1, 1)  # the paper's psi; checkpoints have this name
        self.weigh_norm = BatchNorm(1)

    def forward(self, decoded: Tensor, skip: Tensor) -> Tensor:
        """``decoded`` and ``skip`` (B, C, *spatial) -> the weighted skip connection, of the same shape."""
        found = F.relu(self.query_norm(self.query(decoded)) + self.key_norm(self.key(skip)), inplace=True)
        return skip * torch.sigmoid(self.weigh_norm(self.weigh(found)))

    def prepared(self) -> PreparedAttentionGate:
        """The same for prediction."""
        return PreparedAttentionGate(
            fold_norm(self.query, self.query_norm),
            fold_norm(self.key, self.key_norm),
            fold_norm(self.weigh, self.weigh_norm),
        )


class PreparedAttentionGate(nn.Module):
    """An attention gate whose convolutions of channel pairs are depthwise, which torch has fast kernels for."""

    def __init__(self, query: Convolution, key: Convolution, psi: Convolution) -> None:
        super().__init__()
        assert query.bias is not None and key.bias is not None
        self.pairs = query.groups > 1
        self.bias = nn.Parameter((query.bias + key.bias).view(1, -1, *[1] * (query.weight.ndim - 2)))
        self.query = _unbiased(query, depthwise=self.pairs)
        self.key = _unbiased(key, depthwise=self.pairs)
        self.psi = psi

    def forward(self, decoded: Tensor, skip: Tensor) -> Tensor:
        """``decoded`` and ``skip`` (B, C, *spatial) -> the weighted skip connection, of the same shape."""
        found: Tensor = self.query(decoded)
        found += self.key(skip)
        if self.pairs:
            found = found[:, 0::2] + found[:, 1::2]
        weight: Tensor = self.psi(F.relu(found.add_(self.bias), inplace=True))
        return skip * weight.sigmoid_()


def _unbiased(convolution: Convolution, depthwise: bool) -> Convolution:
    """``convolution`` without its bias; if ``depthwise``, its products not yet summed over each pair of channels."""
    channels = convolution.in_channels
    changed = copy.deepcopy(convolution)
    changed.bias = None
    if depthwise:
        changed.out_channels = changed.groups = channels
        changed.weight = nn.Parameter(convolution.weight.reshape(channels, 1, *convolution.kernel_size))
    return changed


class DecoderStage(nn.Module):
    """Channel attention, a multi-kernel block, upsampling, and the gated skip connection where there is one."""

    def __init__(
        self, attention: ChannelAttention, block: MultiKernelBlock, gate: AttentionGate | None, stride: Sequence[int]
    ) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.attention = attention
        self.block = block
        self.gate = gate

    def forward(self, x: Tensor, spatial_attention: SpatialAttention, skip: Tensor | None) -> Tensor:
        """``x`` (B, C, *spatial) -> (B, C', *spatial * stride)."""
        x = self.attention(x) * x
        x = spatial_attention(x) * x
        mixed = self.block(x)
        upsampled = upsample_linear(mixed, self.stride)
        x = F.relu(upsampled, inplace=True)
        return x if self.gate is None or skip is None else x + self.gate(x, skip)


class Decoder(nn.Module):
    """All decoder stages, the spatial attention that they share, and the head.

    There is one output whatever ``deep_supervision`` is set to.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        kernel_sizes: Sequence[int],
        expansion: int,
        gag_kernel: int,
        spatial_dims: int,
        strides: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.deep_supervision = False
        self.spatial_attention = SpatialAttention(spatial_dims)
        self.stages = nn.ModuleList()
        for level in reversed(range(len(channels))):
            c_in, c_out = channels[level], channels[max(level - 1, 0)]
            attention = ChannelAttention(c_in, ATTENTION_RATIOS[level], spatial_dims)
            block = MultiKernelBlock(c_in, c_out, kernel_sizes, expansion, spatial_dims)
            gate = AttentionGate(c_out, gag_kernel, spatial_dims) if level else None  # full resolution has no skip
            self.stages.append(DecoderStage(attention, block, gate, strides[level]))
        self.seg_layers = nn.ModuleList([POINTWISE[spatial_dims](channels[0], num_classes, 1)])

    def forward(self, x: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """``x`` from the bottleneck and the skip connections from fine to coarse -> logits (B, classes, *spatial)."""
        for stage, skip in zip(self.stages, [*reversed(skips), None], strict=True):
            x = stage(x, self.spatial_attention, skip)
        logits: Tensor = self.seg_layers[0](x)
        return logits


@register_network("ultralight_unet", spatial_dims=(2, 3))
class UltraLightUNet(nn.Module):
    """UltraLightUNet (2D: MK-UNet).

    Args:
        spatial_dims: 2 (as published) or 3 (this project's lift of the unpublished 3D network).
        input_channels: channels of the input; 3 as published.
        num_classes: channels of the logits; 1 as published.
        deep_supervision: must be False, the network is trained on one output.
        variant: "T", "S", "base", "M" or "L".
        channels: of the five levels, even but for the last, instead of a variant's.
        depths: blocks per encoder level.
        kernel_sizes: of the depthwise branches, odd.
        expansion: how many times the channels grow inside a block.
        gag_kernel: of the attention gates, odd; 1 makes them dense, as published.
        strides: of the five poolings, per axis, e.g. ((1, 2, 2), ...); 2 everywhere by default.

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
        variant: str = "base",
        channels: Sequence[int] | None = None,
        depths: Sequence[int] = (1, 1, 1, 1, 1),
        kernel_sizes: Sequence[int] = (1, 3, 5),
        expansion: int = 2,
        gag_kernel: int = 3,
        strides: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise LightNetsError(f"UltraLightUNet has no variant {variant!r}; variants: {', '.join(VARIANTS)}")
        channels = VARIANTS[variant] if channels is None else channels
        levels = len(ATTENTION_RATIOS)
        if len(channels) != levels or any(c < 1 or c % 2 for c in channels[:-1]):
            raise LightNetsError(
                f"UltraLightUNet takes {levels} channel counts, even but for the last (its gates work on pairs of "
                f"channels), got {tuple(channels)}"
            )
        if len(depths) != levels or min(depths) < 1:
            raise LightNetsError(f"UltraLightUNet takes {levels} positive depths, got {tuple(depths)}")
        if not kernel_sizes or any(k < 1 or k % 2 == 0 for k in (*kernel_sizes, gag_kernel)):
            raise LightNetsError(
                f"UltraLightUNet's kernel sizes must be odd, got kernel_sizes={tuple(kernel_sizes)}, "
                f"gag_kernel={gag_kernel}"
            )
        if expansion < 1:
            raise LightNetsError(f"UltraLightUNet's expansion must be at least 1, got {expansion}")
        self.strides = checked_strides("UltraLightUNet", strides, levels, spatial_dims)
        self.total_stride = total_stride(self.strides)
        self.encoder = nn.ModuleList()
        for shallow, deep, depth in zip((input_channels, *channels[:-1]), channels, depths, strict=True):
            inputs = (shallow, *[deep] * (depth - 1))
            blocks = (MultiKernelBlock(c, deep, kernel_sizes, expansion, spatial_dims) for c in inputs)
            self.encoder.append(nn.Sequential(*blocks))
        self.decoder = Decoder(channels, num_classes, kernel_sizes, expansion, gag_kernel, spatial_dims, self.strides)
        # As published: normal with standard deviation 0.02, biases 0; the head keeps torch's default.
        head = set(self.decoder.seg_layers.modules())
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d) and module not in head:
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, *spatial) of any size -> logits (B, classes, *spatial)."""
        spatial = x.shape[2:]
        x = channels_last_on_cpu(pad_to_multiple(x, self.total_stride))
        skips = []
        for stage, stride in zip(self.encoder, self.strides, strict=True):
            x = max_pool(stage(x), stride)
            skips.append(x)
        return crop_to(self.decoder(x, skips[:-1]), spatial)

    def prepare_for_inference_(self) -> None:
        """Rewrite this network for prediction, see ``prepare_for_inference``."""
        encoder: list[Any] = list(self.encoder)
        decoder: list[Any] = list(self.decoder.stages)
        for level, stage in enumerate(encoder):
            self.encoder[level] = nn.Sequential(*(block.prepared() for block in stage))
        for stage in decoder:
            stage.block = stage.block.prepared()
            if stage.gate is not None:
                stage.gate = stage.gate.prepared()

    def from_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict under this network's names; keys unknown here stay as they are.

        Their heads ``out1`` to ``out3``, whose outputs nobody reads, are left out.
        """
        levels = len(self.encoder)
        inside = {
            "pconv1.0": "expand",
            "pconv1.1": "expand_norm",
            "pconv2.0": "project",
            "pconv2.1": "project_norm",
            "conv1x1": "shortcut",
        }
        for branch in range(len(self.encoder[0][0].branches)):  # type: ignore[index]
            inside[f"multi_scale_dwconv.dwconvs.{branch}.0"] = f"branches.{branch}.convolution"
            inside[f"multi_scale_dwconv.dwconvs.{branch}.1"] = f"branches.{branch}.norm"
        ours = {"SA.conv": "decoder.spatial_attention.convolution", f"out{levels - 1}": "decoder.seg_layers.0"}
        for level in range(levels):
            for block in range(len(self.encoder[level])):  # type: ignore[arg-type]
                for theirs, name in inside.items():
                    ours[f"encoder{level + 1}.{block}.{theirs}"] = f"encoder.{level}.{block}.{name}"
            stage = f"decoder.stages.{level}"
            for theirs, name in inside.items():
                ours[f"decoder{level + 1}.0.{theirs}"] = f"{stage}.block.{name}"
            ours[f"CA{level + 1}.fc1"] = f"{stage}.attention.squeeze"
            ours[f"CA{level + 1}.fc2"] = f"{stage}.attention.excite"
            for theirs, name in (("W_g", "query"), ("W_x", "key"), ("psi", "weigh")):
                ours[f"AG{level + 1}.{theirs}.0"] = f"{stage}.gate.{name}"
                ours[f"AG{level + 1}.{theirs}.1"] = f"{stage}.gate.{name}_norm"
        dead = re.compile(rf"out[1-{levels - 2}]\.")
        renamed = {}
        for key, value in state_dict.items():
            if not dead.match(key):
                module, _, leaf = key.rpartition(".")
                renamed[f"{ours.get(module, module)}.{leaf}"] = value
        return renamed
