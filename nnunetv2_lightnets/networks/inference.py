"""Networks made ready for prediction: the same function, computed with fewer and faster steps.

Only exact rewrites are made: two linear steps that follow each other become one. What a network can merge is stated
in its own file, in its method ``prepare_for_inference_``; what every network can merge is stated here.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_Network = TypeVar("_Network", bound=nn.Module)
_PREPARED = "prepared_for_inference"  # attribute of networks that are
_NORM = nn.modules.batchnorm._BatchNorm


def fold_norm(convolution: _Network, norm: nn.Module) -> _Network:
    """One convolution that does what ``convolution`` and then batch norm ``norm`` do in evaluation."""
    return cast(_Network, fuse_conv_bn_eval(cast(nn.Conv2d, convolution), cast(nn.BatchNorm2d, norm)))


def norm_as_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) per channel: what batch norm ``norm`` does in evaluation."""
    assert isinstance(norm, _NORM) and norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def prepare_for_inference(network: _Network) -> _Network:
    """A copy of ``network`` for prediction, equal to it in evaluation within 1e-4; ``network`` is left alone.

    In the copy batch norms are folded into convolutions, linear branches are merged, gradients are off, and on a CPU
    weights lie channels last, the format in which convolutions were measured fastest (benchmarks/light_cnns_cpu.py).
    Its state dict is not the network's: keep the network for training and checkpoints. Prepare it on the device that
    predicts, since what is merged depends on it.
    """
    prepared = copy.deepcopy(network).eval()
    if getattr(prepared, _PREPARED, False):
        return prepared
    with torch.no_grad():
        rewrite = getattr(prepared, "prepare_for_inference_", None)
        if rewrite is not None:
            rewrite()
        else:
            _fold_norms_in_sequences_(prepared)
        if next((p.device.type for p in prepared.parameters()), None) == "cpu":
            _weights_channels_last_(prepared)
    setattr(prepared, _PREPARED, True)
    return prepared.eval().requires_grad_(False)  # what the rewriting made, too


def _fold_norms_in_sequences_(network: nn.Module) -> None:
    """Fold each batch norm that follows a convolution in an ``nn.Sequential``, the container whose order is its own."""
    for sequence in network.modules():
        if not isinstance(sequence, nn.Sequential):
            continue
        for i in range(len(sequence) - 1):
            first, second = sequence[i], sequence[i + 1]
            if isinstance(first, nn.Conv1d | nn.Conv2d | nn.Conv3d) and _has_statistics(second):
                sequence[i] = fold_norm(first, second)
                sequence[i + 1] = nn.Identity()


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NORM) and module.running_mean is not None and module.affine


def _weights_channels_last_(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        elif isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
