"""True costs of a network, counted and not claimed: parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(network: nn.Module) -> int:
    """Number of trainable scalars; a parameter used at several places counts once."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def count_macs(network: nn.Module, input_channels: int, patch: Sequence[int]) -> int:
    """Multiply-accumulates of one forward pass of one patch (batch 1).

    Counted by torch's own counter on convolutions, matrix products and the selective scan (our formula), on the
    ``meta`` device: nothing is computed. Norms, activations and poolings are not counted, as everywhere.

    Args:
        network: a network on the ``meta`` device.
        input_channels: channels of the input.
        patch: spatial size in voxels.
    """
    x = torch.empty(1, input_channels, *patch, device="meta")
    counter = FlopCounterMode(display=False)
    network.eval()
    with torch.no_grad(), counter:
        network(x)
    return int(counter.get_total_flops()) // 2
