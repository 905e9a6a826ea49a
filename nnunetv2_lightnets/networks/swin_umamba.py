"""Swin-UMamba: a VMamba encoder, started from ImageNet, under a residual CNN decoder.

Paper: Swin-UMamba: Mamba-based UNet with ImageNet-based pretraining, Liu et al., MICCAI 2024, arXiv 2402.03302,
section 2; repository JiarunLiu/Swin-UMamba (Apache-2.0), commit 2c1f72e. The decoder's blocks are those of UNETR
(Hatamizadeh et al., WACV 2022) as MONAI builds them.

Two versions were published. The released code is the default here: a decoder stage lifts the encoder's coarsest
features (1/32) to 1/16, 59.9 M parameters. Before March 2024 the decoder began at 1/16 instead, 40.4 M; the paper's
first tables describe that one, and ``bottleneck_decoder=False`` builds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_lightnets.networks.instance_norm import InstanceNorm, instance_norm
from nnunetv2_lightnets.networks.padding import crop_heads, pad_to_multiple
from nnunetv2_lightnets.networks.recompute import recomputed
from nnunetv2_lightnets.networks.registry import register_network
from nnunetv2_lightnets.networks.vss import VSSMEncoder, check_pyramid
from nnunetv2_lightnets.ops.tensors import on_cpu

_SLOPE = 0.01  # of the leaky ReLUs
_FEW = 4  # channels, of which a convolution is computed again sooner than its result is kept


class PointwiseConv(nn.Conv2d):
    """1x1 convolution; on a CPU, of channels-last maps, what it is: a linear layer of each pixel, without copies."""

    def forward(self, *parts: Tensor) -> Tensor:
        """Map ``parts`` (B, C, H, W) of the input, which has in_channels in all, to (B, out_channels, H, W)."""
        if not on_cpu(parts[0]) or any(part.is_contiguous() for part in parts):
            return super().forward(_joined(parts))
        weights = torch.split(self.weight.flatten(1), [part.shape[1] for part in parts], 1)
        out = F.linear(parts[0].permute(0, 2, 3, 1), weights[0], self.bias)
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            out += F.linear(part.permute(0, 2, 3, 1), weight)
        return out.permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance norms around a shortcut, which is a 1x1 convolution where channels change.

    For the backward pass its input and the results of both convolutions are kept; of the first one not, where the
    input has few channels.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = PointwiseConv(in_channels, out_channels, 1, bias=False) if in_channels != out_channels else None

    def forward(self, *parts: Tensor) -> Tensor:
        """Map ``parts`` (B, C, H, W) of the input, which has in_channels in all, to (B, out_channels, H, W)."""
        return recomputed(self.end, self.begin(*parts), *parts)

    def begin(self, *parts: Tensor) -> Tensor:
        """What :meth:`end` takes beside the parts."""
        if self.conv1.in_channels <= _FEW:
            return recomputed(lambda *parts: self._second(self._first(*parts)), *parts)
        return recomputed(self._second, recomputed(self._first, *parts))

    def _first(self, *parts: Tensor) -> Tensor:
        out: Tensor = self.conv1(_joined(parts))
        return out

    def _second(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(_activated(instance_norm(x)))
        return out

    def end(self, out: Tensor, *parts: Tensor) -> Tensor:
        """The block's output, from the result of its second convolution and the parts of its input."""
        shortcut = _joined(parts) if self.shortcut is None else instance_norm(self.shortcut(*parts))
        return _activated(instance_norm(out).add_(shortcut))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _activated(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _SLOPE, inplace=True)


def _in_suitable_layout(x: Tensor) -> Tensor:
    """``x`` in the layout in which a CPU computes its convolutions fastest; GPUs were not measured.

    It is channels last, but for feature maps that are smaller than the weights, which would have to be brought into it.
    """
    last = on_cpu(x) and x[0, 0].numel() > x.shape[1]
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class UpBlock(nn.Module):
    """Doubles the resolution by a transposed convolution, joins the skip connection, then a residual block."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2, bias=False)
        self.block = ResidualBlock(2 * out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map ``x`` (B, in_channels, H, W) and ``skip`` (B, out_channels, 2H, 2W) to the latter's shape."""
        out: Tensor = self.block(_in_suitable_layout(self.upsample(x)), skip)
        return out


class SwinUMambaDecoder(nn.Module):
    """The CNN decoder and its heads.

    Args:
        skips: channels of the skip connections, fine to coarse.
        bottom: channels of the coarsest input, at half the resolution of the last skip connection.
        heads: number of resolutions that have a head, counted from the finest.
        num_classes: channels of each head.
        deep_supervision: return the logits of all heads instead of those at full resolution alone.
    """

    def __init__(self, skips: Sequence[int], bottom: int, heads: int, num_classes: int, deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision  # may be switched at any time
        inputs = (bottom, *reversed(skips[1:]))
        self.ups = nn.ModuleList(UpBlock(*pair) for pair in zip(inputs, reversed(skips), strict=True))
        self.last = ResidualBlock(skips[0], skips[0])
        self.seg_layers = nn.ModuleList(PointwiseConv(channels, num_classes, 1) for channels in skips[:heads])

    def forward(self, bottom: Tensor, skips: Sequence[Tensor]) -> list[Tensor]:
        """Logits (B, num_classes, H / 2**i, W / 2**i) for each head i, or for the first."""
        levels = [bottom]
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            levels.insert(0, up(levels[0], skip))
        last, first_head = self.last, self.seg_layers[0]
        logits = [recomputed(lambda out, x: first_head(last.end(out, x)), last.begin(levels[0]), levels[0])]
        if self.deep_supervision:
            logits += (head(level) for head, level in zip(self.seg_layers[1:], levels[1:], strict=False))
        return logits


@register_network("swin_umamba", spatial_dims=(2,), deep_supervision=True)
class SwinUMamba(nn.Module):
    """Swin-UMamba.

    Any image size is taken: images are padded to a multiple of 32 inside and the logits cropped back.

    Args:
        spatial_dims: 2, the only dimension it exists in.
        input_channels: channels of the input, any number.
        num_classes: channels of the logits.
        deep_supervision: return four logits, at scales 1, 1/2, 1/4 and 1/8, instead of the first. The parameters
            are the same.
        features: channels at 1/2, 1/4, ... of the resolution; from the second each is twice the one before.
        depths: VSS blocks at 1/4, 1/8, ...; published is VMamba-Tiny's (2, 2, 9, 2).
        d_state: size of each channel's hidden state.
        drop_path_rate: stochastic depth grows over the encoder's blocks from 0 to this value.
        bottleneck_decoder: the released code. False is the first version, whose decoder begins at 1/16. It holds
            the encoder's last stage without using it (the stage is not computed here, and its parameters are fixed).
        scan: False builds the network without its selective scans, an ablation, see :class:`SS2D`.

    Raises:
        LightNetsError: another dimension than 2, or ``features`` and ``depths`` that do not fit together.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        features: Sequence[int] = (48, 96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 9, 2),
        d_state: int = 16,
        drop_path_rate: float = 0.2,
        bottleneck_decoder: bool = True,
        scan: bool = True,
    ) -> None:
        super().__init__()
        check_pyramid("swin_umamba", features[1:], depths)
        self.stride = 2 ** len(features)  # the stem's 2, the patch embedding's 2, then 2 between stages
        self.deep_supervision_scales = tuple(2.0**-i for i in range(len(features) - 1))
        self.bottleneck_decoder = bottleneck_decoder
        self.stem = nn.Sequential(
            nn.Conv2d(input_channels, features[0], 7, stride=2, padding=3),
            InstanceNorm(features[0]),
        )
        self.vssm_encoder = VSSMEncoder(features[0], 2, features[1:], depths, d_state, drop_path_rate, scan)
        self.skips = nn.ModuleList(
            ResidualBlock(*pair) for pair in zip((input_channels, *features[:-1]), features, strict=True)
        )
        self.decoder = SwinUMambaDecoder(
            skips=features if bottleneck_decoder else features[:-1],
            bottom=features[-1],
            heads=len(features) - 1,
            num_classes=num_classes,
            deep_supervision=deep_supervision,
        )
        if not bottleneck_decoder:  # parameters without gradients would stop DistributedDataParallel
            for unused in (self.vssm_encoder.layers[-1], self.vssm_encoder.downsamples[-1]):
                unused.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of ``x`` (B, input_channels, H, W): (B, num_classes, H, W), or a list from fine to coarse."""
        size = x.shape[2:]
        x = pad_to_multiple(x, (self.stride, self.stride))
        if on_cpu(x):  # there convolutions are up to twice as fast so; every layer hands the layout on
            x = x.clone(memory_format=torch.channels_last)
        stem = self.stem(x)
        stages = self.vssm_encoder(stem, None if self.bottleneck_decoder else -1)
        features = [x, stem, *(_in_suitable_layout(stage.permute(0, 3, 1, 2)) for stage in stages)]
        skips = [skip(feature) for skip, feature in zip(self.skips, features, strict=False)]
        bottom = features[-1] if self.bottleneck_decoder else skips.pop()
        scales = [(scale, scale) for scale in self.deep_supervision_scales]
        logits = crop_heads(self.decoder(bottom, skips), size, scales)
        return logits if self.decoder.deep_supervision else logits[0]

    def prepare_for_inference_(self) -> None:
        """There is nothing to merge; that weights lie channels last on a CPU is what the copy for prediction is for."""

    def vmamba_keys(self) -> dict[str, str]:
        """From each key of VMamba's ImageNet checkpoint (first version) to the key here that starts from it.

        The patch embedding has no counterpart: it takes the stem's channels, not an image's. The authors' loader
        does load its ``norm.bias``, by a repeated line in its list of exceptions; that is not repeated here.
        """
        keys = self.vssm_encoder.vmamba_keys()
        return {key: f"vssm_encoder.{name}" for key, name in keys.items() if not key.startswith("patch_embed.")}

    def frozen_parameters(self) -> Iterator[str]:
        """Names of the parameters that the recipe freezes at first: the encoder's but for its patch embedding."""
        return (f"vssm_encoder.{name}" for name in self.vssm_encoder.pretrained_names())

    def from_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict under the names used here."""
        levels = len(self.skips) + self.bottleneck_decoder  # the coarsest decoder block's number
        return {_own_name(key, levels): tensor for key, tensor in state_dict.items()}


_CONVOLUTIONS = {"conv1": "conv1", "conv2": "conv2", "conv3": "shortcut"}


def _own_name(key: str, levels: int) -> str:
    """Our name for one of the authors' keys; ``levels`` is the number of their coarsest decoder block."""
    if match := re.fullmatch(r"encoder(\d+)\.layer\.(conv[123])\.conv\.weight", key):
        return f"skips.{int(match[1]) - 1}.{_CONVOLUTIONS[match[2]]}.weight"
    if match := re.fullmatch(r"decoder(\d+)\.transp_conv\.conv\.weight", key):
        return f"decoder.ups.{levels - int(match[1])}.upsample.weight"
    if match := re.fullmatch(r"decoder(\d+)\.conv_block\.(conv[123])\.conv\.weight", key):
        return f"decoder.ups.{levels - int(match[1])}.block.{_CONVOLUTIONS[match[2]]}.weight"
    if match := re.fullmatch(r"decoder1\.layer\.(conv[123])\.conv\.weight", key):
        return f"decoder.last.{_CONVOLUTIONS[match[1]]}.weight"
    if match := re.fullmatch(r"out_layers\.(\d+)\.conv\.conv\.(weight|bias)", key):
        return f"decoder.seg_layers.{match[1]}.{match[2]}"
    return key
