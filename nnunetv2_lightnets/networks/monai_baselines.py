"""SegResNet, UNETR and SwinUNETR as MONAI builds them: baselines of the papers, with the settings that those took.

Sources: Myronenko, arXiv 1810.11654; Hatamizadeh et al., arXiv 2103.10504 and arXiv 2201.01266; MONAI (Apache-2.0), an
optional dependency that is imported when a network is built. Settings are those of LightM-UNet's published trainers.

Inputs are padded with zeros at the end of each axis to what the network takes, and the logits cropped back.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks.padding import crop_to, pad_to_bound, pad_to_multiple
from nnunetv2_lightnets.networks.registry import register_network


def _monai(name: str) -> Any:
    try:
        return getattr(importlib.import_module("monai.networks.nets"), name)
    except ImportError as error:
        raise LightNetsError(
            f"{name} comes from MONAI, which cannot be imported ({error}); pip install 'monai>=1.5'"
        ) from error


class Head(nn.Module):
    """The layer that makes the logits; there is one output whatever ``deep_supervision`` is set to."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.deep_supervision = False
        self.seg_layers = nn.ModuleList([layer])

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes, *spatial) of features (B, C, *spatial)."""
        logits: Tensor = self.seg_layers[0](x)
        return logits


class MonaiNetwork(nn.Module):
    """A network of MONAI without its last layer, and that layer as ``decoder.seg_layers.0``."""

    def __init__(self, body: nn.Module, head: nn.Module, multiple: Sequence[int]) -> None:
        super().__init__()
        self.body = body
        self.decoder = Head(head)
        self.multiple = tuple(multiple)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes, *spatial) of images ``x`` (B, C, *spatial)."""
        return crop_to(self.decoder(self.body(self._padded(x))), x.shape[2:])

    def _padded(self, x: Tensor) -> Tensor:
        return pad_to_multiple(x, self.multiple)


@register_network("segresnet", spatial_dims=(2, 3))
class SegResNet(MonaiNetwork):
    """SegResNet of width 32, for images of any size: 18.8 M parameters in 3D, 6.3 M in 2D."""

    def __init__(
        self, *, spatial_dims: int, input_channels: int, num_classes: int, deep_supervision: bool = False
    ) -> None:
        body = _monai("SegResNet")(
            spatial_dims=spatial_dims,
            init_filters=32,
            in_channels=input_channels,
            out_channels=num_classes,
            blocks_down=(1, 2, 2, 4),
            blocks_up=(1, 1, 1),
        )
        head, body.conv_final[2] = body.conv_final[2], nn.Identity()
        super().__init__(body, head, (8,) * spatial_dims)


@register_network("unetr", spatial_dims=(2, 3))
class UNETR(MonaiNetwork):
    """UNETR, bound to one patch size by its position embedding: smaller images are padded to it, larger ones refused.

    Args:
        patch_size: of the training; rounded up to multiples of 16.
    """

    def __init__(
        self,
        *,
        spatial_dims: int,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        patch_size: Sequence[int],
    ) -> None:
        size = tuple(side + -side % 16 for side in patch_size)
        body = _monai("UNETR")(
            input_channels, num_classes, size, feature_size=16, spatial_dims=spatial_dims, proj_type="conv"
        )
        for block in body.vit.blocks:
            # MONAI builds them also where they are not used; without gradients they would stop several GPUs' training.
            for unused in ("norm_cross_attn", "cross_attn"):
                if not block.with_cross_attention and hasattr(block, unused):
                    delattr(block, unused)
        head, body.out = body.out, nn.Identity()
        super().__init__(body, head, size)

    def _padded(self, x: Tensor) -> Tensor:
        return pad_to_bound(x, self.multiple, "unetr")


@register_network("swin_unetr", spatial_dims=(2, 3))
class SwinUNETR(MonaiNetwork):
    """SwinUNETR with 48 features, for images of any size: 62.2 M parameters in 3D, 25.1 M in 2D."""

    def __init__(
        self, *, spatial_dims: int, input_channels: int, num_classes: int, deep_supervision: bool = False
    ) -> None:
        network = _monai("SwinUNETR")
        device = torch.get_default_device()
        with torch.device("cpu"):  # MONAI reads numbers from a tensor that it makes
            body = network(input_channels, num_classes, feature_size=48, spatial_dims=spatial_dims)
        body.to(device)
        head, body.out = body.out, nn.Identity()
        super().__init__(body, head, (32,) * spatial_dims)

    def _padded(self, x: Tensor) -> Tensor:
        if max(x.shape[2:]) <= 32:  # an instance norm cannot train on the one voxel that would be left of it
            return pad_to_multiple(x, (*self.multiple[1:], 64))
        return super()._padded(x)
