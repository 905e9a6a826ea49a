"""True costs of a network, counted and not claimed: parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_lightnets.ops.flops import register_flop_formulas


def count_parameters(network: nn.Module) -> int:
    """Number of trainable scalars; a parameter used at several places counts once."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def count_macs(network: nn.Module, input_channels: int, patch: Sequence[int]) -> int:
    """Multiply-accumulates of one forward pass of one patch (batch 1), deep supervision as it is set.

    Counted by torch's own counter on convolutions, matrix products and the selective scan (our formula), on fake
    tensors: nothing is computed. Norms, activations and poolings are not counted, as everywhere.

    Args:
        network: on a CPU or GPU.
        input_channels: channels of the input.
        patch: spatial size in voxels.
    """
    device = next(network.parameters()).device
    was_training = network.training
    register_flop_formulas()
    counter = FlopCounterMode(display=False)
    # With gradients, as without them LightM-UNet computes block by block, thousands of them.
    with torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True), counter:
        network.eval()(torch.empty(1, input_channels, *patch, device=device))
    network.train(was_training)
    return int(counter.get_total_flops()) // 2
