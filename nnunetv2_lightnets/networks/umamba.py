"""U-Mamba, a baseline: nnU-Net's U-Net with residual blocks, and Mamba layers in the bottleneck or in the encoder.

Source: Ma, Li and Wang, "U-Mamba: Enhancing Long-range Dependency for Biomedical Image Segmentation", arXiv 2401.04722;
https://github.com/bowang-lab/U-Mamba (Apache-2.0). This is the published code as it is now, which the names of its
checkpoints fit. Its first version, which other papers compare with, had other blocks and up to 92 M parameters.

In 2D the published networks differ from the ones in 3D in two ways, which are kept: the decoder's finest stage gets no
skip connection, and U-Mamba_Enc has Mamba layers in every other stage only.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks.instance_norm import InstanceNorm
from nnunetv2_lightnets.networks.layers import CONVOLUTION, Convolution, upsample_nearest
from nnunetv2_lightnets.networks.mamba import Mamba
from nnunetv2_lightnets.networks.padding import crop_heads, pad_to_bound, pad_to_multiple, total_stride
from nnunetv2_lightnets.networks.recompute import recomputed
from nnunetv2_lightnets.networks.registry import register_network
from nnunetv2_lightnets.ops import mamba_layer

_SLOPE = 0.01  # of the leaky ReLUs
_FEW = 4  # channels, of which a convolution is computed again sooner than its result is kept
_BLOCKS = 2  # of a stage of the finer half; the coarser half has one


class ResidualBlock(nn.Module):
    """Two convolutions with instance norms around a shortcut: the input itself, or with a ``stride`` a 1x1 convolution.

    Kernels are odd along each axis. For the backward pass the parts of its input and the results of both convolutions
    are kept; of the first one not, where the input has few channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Sequence[int], stride: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, out_channels, kernel, stride)
        self.norm1 = InstanceNorm(out_channels)
        self.conv2 = _convolution(out_channels, out_channels, kernel)
        self.norm2 = InstanceNorm(out_channels)
        self.shortcut = None if stride is None else _convolution(in_channels, out_channels, (1,) * len(kernel), stride)

    def forward(self, x: Tensor, *skip: Tensor) -> Tensor:
        """Map ``x`` (B, in_channels, *spatial) to (B, out_channels, *spatial / stride).

        With a ``skip`` connection ``x`` is coarser, or as fine; the input is both, and has in_channels in all.
        """
        if not torch.is_grad_enabled():
            x, skip = _joined(x, *skip), ()
        if self.conv1.in_channels <= _FEW:
            out = recomputed(lambda *parts: self._second(self._first(*parts)), x, *skip)
        else:
            out = recomputed(self._second, recomputed(self._first, x, *skip))
        return recomputed(self._end, out, x, *skip)

    def _first(self, *parts: Tensor) -> Tensor:
        out: Tensor = self.conv1(_joined(*parts))
        return out

    def _second(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(_activated(self.norm1(x)))
        return out

    def _end(self, out: Tensor, *parts: Tensor) -> Tensor:
        x = _joined(*parts)
        return _activated(self.norm2(out) + (x if self.shortcut is None else self.shortcut(x)))


def _joined(x: Tensor, *skip: Tensor) -> Tensor:
    """``x``, brought to the size of a skip connection if there is one, and its channels before those of that."""
    if not skip:
        return x
    stride = [fine // coarse for fine, coarse in zip(skip[0].shape[2:], x.shape[2:], strict=True)]
    return torch.cat((upsample_nearest(x, stride), skip[0]), dim=1)


def _activated(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _SLOPE, inplace=True)


def _convolution(
    in_channels: int, out_channels: int, kernel: Sequence[int], stride: Sequence[int] | None = None
) -> Convolution:
    sizes: Any = (tuple(kernel), tuple(stride or (1,) * len(kernel)), tuple(k // 2 for k in kernel))
    return CONVOLUTION[len(kernel)](in_channels, out_channels, *sizes)


def _stage(
    in_channels: int, out_channels: int, kernel: Sequence[int], stride: Sequence[int], blocks: int
) -> nn.Sequential:
    """A residual block that changes the shape, and further ones that do not."""
    return nn.Sequential(
        ResidualBlock(in_channels, out_channels, kernel, stride),
        *(ResidualBlock(out_channels, out_channels, kernel) for _ in range(blocks - 1)),
    )


class MambaLayer(nn.Module):
    """Layer norm and a Mamba block, whose output replaces the features: there is no residual connection.

    Args:
        channels: of the features.
        voxels: of the feature map, if channels are the tokens and voxels their entries; None for the usual way round.
    """

    def __init__(self, channels: int, voxels: int | None = None) -> None:
        super().__init__()
        self.channels_are_tokens = voxels is not None
        self.norm = nn.LayerNorm(voxels or channels)
        self.mamba = Mamba(voxels or channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, C, *spatial) to the same shape."""
        tokens = x.flatten(2)  # (B, C, L)
        if self.channels_are_tokens:
            return self._mixed(tokens).reshape(x.shape)
        mixed = self._mixed(tokens.transpose(1, 2))  # (B, L, C)
        # Contiguous: the backward pass of torch 2.14's 1x1 convolutions with a stride, which the next stage has, writes
        # beyond its memory on a CPU if channels are last.
        return mixed.transpose(1, 2).contiguous().reshape(x.shape)

    def _mixed(self, tokens: Tensor) -> Tensor:
        norm = {"norm_weight": self.norm.weight, "norm_bias": self.norm.bias, "norm_eps": self.norm.eps}
        return mamba_layer(self.mamba.layer(tokens, **norm))


class Encoder(nn.Module):
    """Stem and stages; after a stage a Mamba layer, where there is one."""

    def __init__(
        self,
        input_channels: int,
        features: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        mamba: Mapping[int, MambaLayer],
    ) -> None:
        super().__init__()
        n_stages = len(features)
        blocks = [_BLOCKS if stage < math.ceil(n_stages / 2) else 1 for stage in range(n_stages)]
        unit = (1,) * len(kernel_sizes[0])
        self.stem = _stage(input_channels, features[0], kernel_sizes[0], unit, blocks[0])
        self.stages = nn.ModuleList(
            _stage(*settings)
            for settings in zip((features[0], *features[:-1]), features, kernel_sizes, strides, blocks, strict=True)
        )
        self.mamba_layers = nn.ModuleDict({str(stage): layer for stage, layer in mamba.items()})

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of all stages from fine to coarse."""
        x = self.stem(x)
        features = []
        for stage, blocks in enumerate(self.stages):
            x = blocks(x)
            if str(stage) in self.mamba_layers:
                x = self.mamba_layers[str(stage)](x)
            features.append(x)
        return features


class Decoder(nn.Module):
    """Stages from coarse to fine, each with a head.

    A 1x1 convolution and nearest-neighbour upsampling can change places; here the convolution comes first and sees
    fewer voxels. The published code upsamples first.
    """

    def __init__(
        self,
        features: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        num_classes: int,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision  # may be switched at any time
        dims, n_stages = len(kernel_sizes[0]), len(features) - 1
        unit = (1,) * dims
        self.strides = tuple(tuple(stride) for stride in reversed(strides[1:]))
        self.upsample_layers, self.stages, self.seg_layers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage, level in enumerate(reversed(range(n_stages))):
            channels = features[level]
            joined = 2 * channels if level > 0 or dims == 3 else channels
            blocks = _BLOCKS if stage < math.ceil(n_stages / 2 + 0.5) else 1
            self.upsample_layers.append(_convolution(features[level + 1], channels, unit))
            self.stages.append(_stage(joined, channels, kernel_sizes[level], unit, blocks))
            self.seg_layers.append(_convolution(channels, num_classes, unit))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Logits of all stages from fine to coarse, or of the finest alone, from the encoder's features."""
        skips, x = list(features[:-1]), features[-1]  # torch 2.11's compiler makes a tuple of *skips
        logits: list[Tensor] = []
        last = len(self.stages) - 1
        for i, (upsample, stride, stage, head) in enumerate(
            zip(self.upsample_layers, self.strides, self.stages, self.seg_layers, strict=True)
        ):
            x = upsample(x)
            if i < last or x.ndim == 5:
                first, *others = cast(nn.Sequential, stage)
                x = first(x, skips.pop())
                for block in others:
                    x = block(x)
            else:
                x = stage(upsample_nearest(x, stride))
            if self.deep_supervision or i == last:
                logits.insert(0, head(x))
        return logits


class UMamba(nn.Module, ABC):
    """What both networks share; they differ in where their Mamba layers are.

    Sizes that the strides do not divide are padded with zeros, and the logits cropped.

    Args:
        spatial_dims: 2 or 3.
        input_channels: channels of the image.
        num_classes: channels of the logits.
        deep_supervision: return the logits of all decoder stages, from fine to coarse, instead of the finest. The
            parameters are the same.
        features: channels of each stage.
        kernel_sizes: of each stage, per axis, odd; 3 everywhere if None.
        strides: of each stage, per axis, the first one 1; 2 after the first if None.
        patch_size: see the subclass.

    Raises:
        LightNetsError: settings that do not fit together.
    """

    name: str

    def __init__(
        self,
        *,
        spatial_dims: int,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        features: Sequence[int] = (32, 64, 128, 256, 320, 320),
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        strides: Sequence[Sequence[int]] | None = None,
        patch_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        n_stages = len(features)
        kernel_sizes = kernel_sizes or ((3,) * spatial_dims,) * n_stages
        strides = strides or ((1,) * spatial_dims, *((2,) * spatial_dims,) * (n_stages - 1))
        if len(features) < 2 or not len(features) == len(kernel_sizes) == len(strides):
            raise LightNetsError(
                f"{self.name} takes as many kernel_sizes and strides as features, and at least two, got "
                f"{len(kernel_sizes)}, {len(strides)} and {len(features)}"
            )
        axes = (*kernel_sizes, *strides, *([] if patch_size is None else [patch_size]))
        if any(len(sizes) != spatial_dims or min(sizes) < 1 for sizes in axes) or any(
            k % 2 == 0 for kernel in kernel_sizes for k in kernel
        ):
            raise LightNetsError(
                f"{self.name} in {spatial_dims}D takes {spatial_dims} positive numbers for each kernel (odd), stride "
                f"and the patch size, got {kernel_sizes}, {strides} and {patch_size}"
            )
        self.strides = tuple(tuple(stride) for stride in strides)
        self.multiple = total_stride(self.strides)
        self._head_scales = tuple(
            tuple(1 / s for s in total_stride(self.strides[: head + 1])) for head in range(n_stages - 1)
        )
        self.bound_to: tuple[int, ...] | None = None  # the only size that the parameters fit
        mamba = self._mamba_layers(features, patch_size)
        self.encoder = Encoder(input_channels, features, kernel_sizes, strides, mamba)
        self.decoder = Decoder(features, kernel_sizes, strides, num_classes, deep_supervision)
        for module in self.modules():  # as published: He's values for images' convolutions, torch's own for tokens'
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, a=_SLOPE)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @abstractmethod
    def _mamba_layers(self, features: Sequence[int], patch_size: Sequence[int] | None) -> dict[int, MambaLayer]:
        """The Mamba layers, by their stage."""

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of ``x`` (B, channels, *spatial): (B, num_classes, *spatial), or a list from fine to coarse.

        Raises:
            LightNetsError: if ``x`` is larger than what the parameters are bound to.
        """
        bound = self.bound_to
        padded = pad_to_multiple(x, self.multiple) if bound is None else pad_to_bound(x, bound, self.name)
        logits = crop_heads(self.decoder(self.encoder(padded)), x.shape[2:], self._head_scales)
        return logits if self.decoder.deep_supervision else logits[0]

    def from_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict under our names; it has most tensors two or three times."""
        state = {}
        for key, tensor in state_dict.items():
            if not key.startswith("decoder.encoder.") and ".all_modules." not in key:
                state[_our_name(key, len(self.strides) - 1)] = tensor
        return state


def _our_name(key: str, last_stage: int) -> str:
    key = re.sub(r"^mamba_layer\.", f"encoder.mamba_layers.{last_stage}.", key)
    key = re.sub(r"\.(conv[12])\.conv\.", r".\1.", key)
    key = re.sub(r"\.conv([12])\.norm\.", r".norm\1.", key)
    key = re.sub(r"^(decoder\.upsample_layers\.\d+)\.conv\.", r"\1.", key)
    return key.replace(".conv3.", ".shortcut.")


@register_network("umamba_bot", spatial_dims=(2, 3), deep_supervision=True)
class UMambaBot(UMamba):
    """U-Mamba_Bot: one Mamba layer, after the coarsest stage.

    Arguments as in :class:`UMamba`; ``patch_size`` does not matter.
    """

    name = "umamba_bot"

    def _mamba_layers(self, features: Sequence[int], patch_size: Sequence[int] | None) -> dict[int, MambaLayer]:
        return {len(features) - 1: MambaLayer(features[-1])}


@register_network("umamba_enc", spatial_dims=(2, 3), deep_supervision=True)
class UMambaEnc(UMamba):
    """U-Mamba_Enc: Mamba layers after every stage of the encoder (3D), or every other, the last included (2D).

    Where a feature map has no more voxels than channels the published network takes the channels for tokens, so that
    the number of voxels is a number of weights. Such a network is bound to its patch size: smaller patches are padded
    to it, larger ones refused. On patches that the strides do not divide the published code fails; here the padded
    patch counts.

    Further arguments as in :class:`UMamba`.

    Args:
        patch_size: of the training. None takes voxels for tokens everywhere, and any size later: not what was
            published.
    """

    name = "umamba_enc"

    def _mamba_layers(self, features: Sequence[int], patch_size: Sequence[int] | None) -> dict[int, MambaLayer]:
        n_stages, layers = len(features), {}
        if patch_size is not None:
            padded = tuple(math.ceil(side / m) * m for side, m in zip(patch_size, self.multiple, strict=True))
        for stage, channels in enumerate(features):
            if len(self.multiple) == 2 and stage % 2 == n_stages % 2:
                continue
            voxels = None
            if patch_size is not None:
                stride = total_stride(self.strides[: stage + 1])
                size = math.prod(side // s for side, s in zip(padded, stride, strict=True))
                if size <= channels:
                    voxels, self.bound_to = size, padded
            layers[stage] = MambaLayer(channels, voxels)
        return layers
