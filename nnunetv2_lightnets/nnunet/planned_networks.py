"""Our networks as nnU-Net's plans name them, so that nnU-Net's own ``nnUNetTrainer`` builds, trains and predicts them.

``nnunetv2_lightnets.plans.networks.LightMUNet`` is LightMUNet with the arguments that nnU-Net passes; every network of
the registry is here under its class's name. Parameters have the same names as the network's own.

nnU-Net's trainer always trains with deep supervision. It weights the outputs 1, 1/2, 1/4, ... from fine to coarse, sets
the last weight to 0, passes over what has weight 0, and scales the rest to the sum 1. So a network published with one
output hands it two: its logits, which have all the weight, and a copy at half the resolution, which has none. The loss
is then that of the one output, exactly. (Where several GPUs train without compilation the last weight is 1e-6.) The
plan's ``strides`` say at which resolutions outputs are, as nnU-Net reads them from there; the strides inside the
network are its ``network_strides``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_lightnets.networks import list_networks, network_entry


def output_strides(scales: Sequence[float], spatial_dims: int) -> list[list[int]]:
    """A plan's ``strides`` from which nnU-Net derives these scales of outputs.

    nnU-Net takes the product of the strides up to each stage for the inverse of its scale, and drops the last stage.

    Args:
        scales: of the outputs, from 1 to coarse; powers of 2.
        spatial_dims: 2 or 3.
    """
    steps = [1, *(round(fine / coarse) for fine, coarse in pairwise(scales)), 2]
    return [[step] * spatial_dims for step in steps]


class _Planned(nn.Module):
    """What is added to a network: nnU-Net's arguments, and two outputs in the place of one for its trainer."""

    def __init__(
        self,
        *,
        input_channels: int,
        num_classes: int,
        strides: Sequence[Sequence[int]],
        deep_supervision: bool = False,
        network_strides: Sequence[Sequence[int]] | None = None,
        **architecture: Any,
    ) -> None:
        if network_strides is not None:
            architecture["strides"] = network_strides
        super().__init__(input_channels=input_channels, num_classes=num_classes, **architecture)
        self.decoder.deep_supervision = deep_supervision  # type: ignore[union-attr]
        self._second_output_stride = tuple(strides[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits (B, classes, *spatial) of ``x`` (B, C, *spatial), or a list of them under deep supervision."""
        out: torch.Tensor | list[torch.Tensor] = super().forward(x)
        if isinstance(out, list) or not self.decoder.deep_supervision:  # type: ignore[union-attr]
            return out
        # The size is what nnU-Net makes of the target.
        sides = zip(out.shape[2:], self._second_output_stride, strict=True)
        return [out, F.interpolate(out, size=[max(1, round(side / stride)) for side, stride in sides])]


@cache  # a name is one class
def __getattr__(name: str) -> Any:
    for entry in map(network_entry, list_networks()):
        if entry.network_class.__name__ == name:
            namespace = {"__module__": __name__, "__qualname__": name, "__doc__": entry.network_class.__doc__}
            return type(name, (_Planned, entry.network_class), namespace)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
