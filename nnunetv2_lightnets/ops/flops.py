"""FLOP formulas of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

Convention: one multiply-accumulate (MAC) is two FLOPs, and element-wise functions (exp, softplus, SiLU, the gate)
count nothing, as torch counts no activations. MACs of

- a forward scan: 2 for every batch item, channel, token and state (the state's update, and its part of the output),
  and 1 for every batch item, channel and token if there is a ``D``;
- a backward scan: 5 and 2, as both factors of each of these products get a gradient, and states are updated anew;
- a causal convolution: 1 for every output and tap; backwards 2, as torch counts convolutions.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from nnunetv2_lightnets.ops.library import NAMESPACE

Shape = tuple[int, ...]
Formula = Callable[..., int]

_COUNTER = "torch.utils.flop_counter"


def _scan_macs(states: int, skips: int, u: Shape, A: Shape, D: Shape | None) -> int:
    *channels, state = A  # (D, N), or (K, D, N) for K directions
    return u[0] * math.prod(channels) * u[2] * (states * state + skips * (D is not None))


def scan_flops(u: Shape, delta: Shape, A: Shape, B: Shape, C: Shape, D: Shape | None, *_: Any, **__: Any) -> int:
    """FLOPs of ``selective_scan`` and ``directional_scan``; tensors come as shapes."""
    return 2 * _scan_macs(2, 1, u, A, D)


def scan_backward_flops(grad_out: Shape, grad_last_state: Shape | None, *scan: Any, **__: Any) -> int:
    """FLOPs of ``selective_scan_backward``; tensors come as shapes."""
    u, _, A, _, _, D = scan[:6]
    return 2 * _scan_macs(5, 2, u, A, D)


def directional_backward_flops(grad_y: Shape, *scan: Any, **__: Any) -> int:
    """FLOPs of ``directional_scan_backward``; tensors come as shapes."""
    return scan_backward_flops(grad_y, None, *scan)


def conv_flops(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """FLOPs of ``causal_conv1d``; tensors come as shapes."""
    return 2 * math.prod(x) * weight[1]


def conv_backward_flops(grad_y: Shape, x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """FLOPs of ``causal_conv1d_backward``; tensors come as shapes."""
    return 2 * conv_flops(x, weight)


_FORMULAS: dict[str, Formula] = {
    "selective_scan": scan_flops,
    "selective_scan_backward": scan_backward_flops,
    "directional_scan": scan_flops,
    "directional_scan_backward": directional_backward_flops,
    "causal_conv1d": conv_flops,
    "causal_conv1d_backward": conv_backward_flops,
}


def register_flop_formulas() -> None:
    """Register the formulas of the operators, which must exist, now or when torch's FLOP counter is imported.

    Importing it here would import Triton, for everybody who runs a network; registering when a counter is made is too
    late, as it copies the formulas that it finds.
    """
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in _FORMULAS.items():
        register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name))(formula)


class _AfterImport(MetaPathFinder):
    """Registers the formulas as soon as the FLOP counter's module has been executed."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
