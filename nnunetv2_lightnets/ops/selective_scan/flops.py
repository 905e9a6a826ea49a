"""Formulas for torch's FLOP counter.

Convention: one multiply-accumulate (MAC) is two FLOPs, and element-wise functions (exp, softplus, the gate) count
nothing, as torch counts no activations. A forward scan is 2 MACs for every batch item, channel, token and state
(the state's update and its part of the output), and 1 for every batch item, channel and token if there is a ``D``.
A backward scan is 5 and 2: both factors of each of these products get a gradient, and the states are updated anew.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Shape = tuple[int, ...]


def _macs(states: int, skips: int, u: Shape, A: Shape, has_D: bool) -> int:
    batch, _, length = u
    channels, state = A[0], A[-1]
    if len(A) == 3:  # directional: (K, D, N)
        channels *= A[1]
    return batch * channels * length * (states * state + skips * has_D)


def scan_flops(u: Shape, delta: Shape, A: Shape, B: Shape, C: Shape, D: Shape | None, *_: Any, **__: Any) -> int:
    """FLOPs of the forward operators, whose arguments come as shapes."""
    return 2 * _macs(2, 1, u, A, D is not None)


def scan_backward_flops(
    grad_out: Shape,
    grad_last_state: Shape | None,
    u: Shape,
    delta: Shape,
    A: Shape,
    B: Shape,
    C: Shape,
    D: Shape | None,
    *_: Any,
    **__: Any,
) -> int:
    """FLOPs of ``selective_scan_backward``, whose arguments come as shapes."""
    return 2 * _macs(5, 2, u, A, D is not None)


def directional_backward_flops(grad_y: Shape, *scan: Any, **__: Any) -> int:
    """FLOPs of ``directional_scan_backward``, whose arguments come as shapes."""
    return scan_backward_flops(grad_y, None, *scan)


def register_flop_formulas(namespace: str) -> None:
    """Register the formulas now, or when torch's FLOP counter is imported.

    Importing it here would import Triton, for everybody who runs a network; registering when a counter is made is too
    late, as it copies the formulas that it finds.
    """
    if _COUNTER in sys.modules:
        _register(namespace)
    else:
        sys.meta_path.insert(0, _AfterImport(namespace))


_COUNTER = "torch.utils.flop_counter"


def _register(namespace: str) -> None:
    from torch import ops
    from torch.utils.flop_counter import register_flop_formula

    for operator, formula in (
        ("selective_scan", scan_flops),
        ("selective_scan_backward", scan_backward_flops),
        ("directional_scan", scan_flops),
        ("directional_scan_backward", directional_backward_flops),
    ):
        register_flop_formula(getattr(getattr(ops, namespace), operator))(formula)


class _AfterImport(MetaPathFinder):
    """Registers the formulas as soon as the FLOP counter's module has been executed."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(self.namespace)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
