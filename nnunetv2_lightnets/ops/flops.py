"""FLOP formulas of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

Call :func:`register_flop_formulas` before making a counter. (This module imports the counter's, which imports Triton
where that is installed; so nothing else in ``ops`` imports this one.)

Convention: one multiply-accumulate (MAC) is two FLOPs, and element-wise functions (exp, softplus, SiLU, the gate)
count nothing, as torch counts no activations. MACs of

- a forward scan: 2 for every batch item, channel, token and state (the state's update, and its part of the output),
  and 1 for every batch item, channel and token if there is a ``D``;
- a backward scan: 5 and 2, as both factors of each of these products get a gradient, and states are updated anew;
- a causal convolution: the kernel size for every output; backwards twice that, as torch counts convolutions;
- a Mamba layer: those of its projections, its convolution and its scan; backwards twice that for the projections. What
  the backward pass computes again counts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from nnunetv2_lightnets.ops.library import NAMESPACE
from nnunetv2_lightnets.ops.mamba_layer.record import PROJECTIONS, TENSORS

Shape = tuple[int, ...]


def _scan_macs(states: int, skips: int, u: Shape, A: Shape, D: Shape | None) -> int:
    *channels, state = A  # (D, N), or (K, D, N) for K directions
    return u[0] * math.prod(channels) * u[2] * (states * state + skips * (D is not None))


def scan_flops(u: Shape, delta: Shape, A: Shape, B: Shape, C: Shape, D: Shape | None, *_: Any, **__: Any) -> int:
    """FLOPs of ``selective_scan``; tensors come as shapes."""
    return 2 * _scan_macs(2, 1, u, A, D)


def scan_backward_flops(grad_out: Shape, grad_last_state: Shape | None, *scan: Any, **__: Any) -> int:
    """FLOPs of ``selective_scan_backward``; tensors come as shapes."""
    u, _, A, _, _, D = scan[:6]
    return 2 * _scan_macs(5, 2, u, A, D)


def conv_flops(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """FLOPs of ``causal_conv1d``; tensors come as shapes."""
    return 2 * math.prod(x) * weight[1]


def conv_backward_flops(grad_y: Shape, x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """FLOPs of ``causal_conv1d_backward``; tensors come as shapes."""
    return 2 * conv_flops(x, weight)


def mamba_layer_flops(*layer: Any, **_: Any) -> int:
    """FLOPs of ``mamba_layer``; tensors come as shapes."""
    return _mamba_layer_flops(layer, products=1, conv=conv_flops, scan=(2, 1))


def mamba_layer_backward_flops(grad_out: Shape, *layer: Any, **_: Any) -> int:
    """FLOPs of ``mamba_layer_backward``; tensors come as shapes."""
    conv = partial(conv_backward_flops, grad_out)
    return _mamba_layer_flops(layer, products=2, conv=conv, scan=(5, 2))


def _mamba_layer_flops(layer: Sequence[Any], products: int, conv: Callable[..., int], scan: tuple[int, int]) -> int:
    shapes = dict(zip(TENSORS, layer, strict=False))
    batch, length, _ = shapes["tokens"]
    inner = (batch, shapes["D"][0], length)
    weights = (shapes[name] for name in TENSORS if name in PROJECTIONS and shapes[name] is not None)
    macs = products * batch * length * sum(map(math.prod, weights))
    macs += _scan_macs(*scan, inner, shapes["A_log"], shapes["D"])
    flops: int = 2 * macs + conv(inner, shapes["conv_weight"])
    return flops


@cache
def register_flop_formulas() -> None:
    """Register the formulas, once. To be called before a counter is made, which copies the formulas that it finds."""
    formulas: dict[str, Callable[..., int]] = {
        "selective_scan": scan_flops,
        "selective_scan_backward": scan_backward_flops,
        "causal_conv1d": conv_flops,
        "causal_conv1d_backward": conv_backward_flops,
        "mamba_layer": mamba_layer_flops,
        "mamba_layer_backward": mamba_layer_backward_flops,
    }
    for name, formula in formulas.items():
        register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name))(formula)
