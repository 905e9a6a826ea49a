"""Swin-UMamba†: a VMamba encoder, started from ImageNet, under a decoder of VSS blocks.

Paper: Swin-UMamba: Mamba-based UNet with ImageNet-based pretraining, Liu et al., MICCAI 2024, arXiv 2402.03302,
section 2 (Swin-UMamba†); repository JiarunLiu/Swin-UMamba (Apache-2.0), commit 2c1f72e, where it is called
SwinUMambaD. Its patch expansion is Swin-Unet's (Cao et al., ECCV Workshops 2022, arXiv 2105.05537).

Attributes keep the authors' names: their checkpoints need no translation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_lightnets.networks.padding import crop_heads, pad_to_multiple
from nnunetv2_lightnets.networks.recompute import recomputed
from nnunetv2_lightnets.networks.registry import register_network
from nnunetv2_lightnets.networks.vss import VSSMEncoder, VSSStage, check_pyramid

_PATCH = 4  # side of the encoder's patches, and factor of the last expansion
_BLOCKS = 2  # of each decoder stage
_PARTS = 8  # of an image, in which its features at full resolution are computed one after the other


class PatchExpand(nn.Module):
    """Multiplies the resolution: a linear layer makes each pixel's vector those of ``scale`` x ``scale`` pixels."""

    def __init__(self, in_channels: int, out_channels: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(in_channels, scale**2 * out_channels, bias=False)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, H, W, in_channels) to (B, scale * H, scale * W, out_channels)."""
        batch, height, width, _ = x.shape
        x = self.expand(x).view(batch, height, width, self.scale, self.scale, -1)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height * self.scale, width * self.scale, -1)
        out: Tensor = self.norm(x)
        return out


class Head(nn.Conv2d):
    """1x1 convolution that takes channels-last maps, computed as what it is: a linear layer of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, H, W, in_channels) to logits (B, out_channels, H, W)."""
        return F.linear(x, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class SwinUMambaDDecoder(nn.Module):
    """The decoder of VSS blocks and its heads; ``features`` are the channels of the encoder's stages, fine to coarse.

    Stochastic depth falls over the blocks from ``drop_path_rate`` to 0.
    """

    def __init__(
        self, features: Sequence[int], num_classes: int, d_state: int, drop_path_rate: float, deep_supervision: bool
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision  # may be switched at any time
        channels = tuple(reversed(features))  # coarse to fine
        fine = channels[1:]
        rates = torch.linspace(drop_path_rate, 0, _BLOCKS * len(fine), device="cpu").tolist()
        self.expand_layers = nn.ModuleList(
            PatchExpand(c_in, c_out, 2) for c_in, c_out in zip(channels, fine, strict=False)
        )
        self.expand_layers.append(PatchExpand(fine[-1], fine[-1], _PATCH))
        self.concat_back_dim = nn.ModuleList(nn.Linear(2 * c, c) for c in fine)
        self.stages = nn.ModuleList(
            VSSStage(c, rates[_BLOCKS * i : _BLOCKS * (i + 1)], d_state) for i, c in enumerate(fine)
        )
        self.seg_layers = nn.ModuleList(Head(c, num_classes, 1) for c in (*fine, fine[-1]))

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Logits from the encoder's ``stages`` (B, H, W, C), which go from fine to coarse, as do the logits."""
        *skips, x = stages
        levels = []  # coarse to fine
        for expand, merge, stage, skip in zip(
            self.expand_layers, self.concat_back_dim, self.stages, reversed(skips), strict=False
        ):
            x = stage(recomputed(partial(_joined, expand, merge), x, skip))
            levels.append(x)
        first = 0 if self.deep_supervision else len(levels)
        heads = zip(self.seg_layers[first:], levels[first:], strict=False)
        coarse = [head(level) for head, level in heads]
        # At full resolution there are 16 times as many pixels, whose features are not kept, and never all there.
        finest = nn.Sequential(self.expand_layers[-1], self.seg_layers[-1])
        rows = [recomputed(finest, part) for part in torch.split(x, math.ceil(x.shape[1] / _PARTS), 1)]
        return [torch.cat(rows, dim=2), *reversed(coarse)]


def _joined(expand: nn.Module, merge: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
    out: Tensor = merge(torch.cat((expand(x), skip), dim=-1))
    return out


@register_network("swin_umamba_d", spatial_dims=(2,), deep_supervision=True)
class SwinUMambaD(nn.Module):
    """Swin-UMamba†.

    Any image size is taken: images are padded to a multiple of 32 inside and the logits cropped back. (The authors'
    code returns a smaller map, without a word, where a side is up to 3 pixels above a multiple of 32.)

    Args:
        spatial_dims: 2, the only dimension it exists in.
        input_channels: channels of the input, any number.
        num_classes: channels of the logits.
        deep_supervision: return four logits, at scales 1, 1/4, 1/8 and 1/16, instead of the first. The parameters
            are the same.
        features: channels at 1/4, 1/8, ... of the resolution, each twice the one before.
        depths: VSS blocks of the encoder at these resolutions; published is VMamba-Tiny's (2, 2, 9, 2).
        d_state: size of each channel's hidden state.
        drop_path_rate: stochastic depth grows over the encoder's blocks from 0 to this value, and falls back to 0
            over the decoder's.

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
        features: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 9, 2),
        d_state: int = 16,
        drop_path_rate: float = 0.2,
    ) -> None:
        super().__init__()
        check_pyramid("swin_umamba_d", features, depths)
        self.stride = _PATCH * 2 ** (len(features) - 1)
        self.deep_supervision_scales = (1.0, *(1 / (_PATCH * 2**i) for i in range(len(features) - 1)))
        self.vssm_encoder = VSSMEncoder(input_channels, _PATCH, features, depths, d_state, drop_path_rate)
        self.decoder = SwinUMambaDDecoder(features, num_classes, d_state, drop_path_rate, deep_supervision)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # depthwise convolutions and patch embedding too, as published
                nn.init.kaiming_normal_(module.weight, a=1e-2)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of ``x`` (B, input_channels, H, W): (B, num_classes, H, W), or a list from fine to coarse."""
        size = x.shape[2:]
        stages = self.vssm_encoder(pad_to_multiple(x, (self.stride, self.stride)))
        logits = crop_heads(self.decoder(stages), size, [(scale, scale) for scale in self.deep_supervision_scales])
        return logits if self.decoder.deep_supervision else logits[0]

    def vmamba_keys(self) -> dict[str, str]:
        """From each key of VMamba's ImageNet checkpoint (first version) to the key here that starts from it.

        All of the encoder. Its patch embedding is ImageNet's as it is where the input has three channels.
        """
        return {key: f"vssm_encoder.{name}" for key, name in self.vssm_encoder.vmamba_keys().items()}

    def frozen_parameters(self) -> Iterator[str]:
        """Names of the parameters that the recipe freezes at first: the encoder's but for its patch embedding."""
        return (f"vssm_encoder.{name}" for name in self.vssm_encoder.pretrained_names())

    def from_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict under the names used here, which are theirs."""
        return dict(state_dict)
