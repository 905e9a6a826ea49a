"""The scan as an operator of torch: autograd, fake kernels and backends behind it, for eager and compiled code alike.

Operators are strict where the public functions are lenient: they take exactly the dtypes that the backends read, so
that no half-precision tensor is ever read as something else under autocast.

The backend is chosen when a scan runs. Its gradient is computed by the same one, in whatever thread or compiled graph
that happens: ``used``, a number in a tensor on the CPU, goes there with the saved states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnunetv2_lightnets.ops.library import define, define_backward
from nnunetv2_lightnets.ops.scan_order import check_order
from nnunetv2_lightnets.ops.selective_scan.dispatch import NAMES, choose
from nnunetv2_lightnets.ops.selective_scan.record import Scan

_SCAN = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? order, bool delta_softplus"
)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *fields, save_states, traced = arguments
    scan = Scan(*fields)
    scan.check()
    if scan.order is not None:
        check_order(scan.order)
    backend = choose(scan)
    out, last_state, states = backend.forward(scan, save_states)
    if traced and save_states and states.numel() != scan.saved_numbers:
        states = scan.A.new_empty(scan.saved_numbers)  # a graph relies on the size that the fake kernel promises
    used = torch.scalar_tensor(NAMES.index(backend.NAME), dtype=torch.uint8, device="cpu")
    return out, last_state.contiguous(), states, used


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *fields, save_states, _ = arguments
    scan = Scan(*fields)
    scan.check()
    # Flat, as a dimension of n_chunks(length) would tell the exporter that a dynamic length has more than one chunk.
    states = scan.A.new_empty(scan.saved_numbers if save_states else 0)
    used = torch.empty((), dtype=torch.uint8, device="cpu")
    return torch.empty_like(scan.u), scan.A.new_empty(scan.state_shape), states, used


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, _, _ = inputs
    _, _, states, used = output
    ctx.mark_non_differentiable(states, used)
    ctx.save_for_backward(*tensors, states, used)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *tensors, order, states, used = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(tensors[0])
    operator = torch.ops.nnunetv2_lightnets.selective_scan_backward
    gradients = operator(grad_out, grad_last_state, *tensors, order, ctx.delta_softplus, states, used)
    found = (None if tensor is None else grad for grad, tensor in zip(gradients, tensors, strict=True))
    return (*found, None, None, None, None)


def _backward(grad_out: Tensor, grad_last_state: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    *fields, states, used = arguments
    scan = Scan(*fields)
    scan.check()
    scan.check_gradients(grad_out, grad_last_state, states)
    if scan.order is not None:
        check_order(scan.order)
    backend = choose(scan, NAMES[int(used)])
    gradients = backend.backward(scan, (grad_out, grad_last_state), states)
    return tuple(scan.u.new_empty(0) if grad is None else grad for grad in gradients)


def _backward_fake(grad_out: Tensor, grad_last_state: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    scan = Scan(*arguments[:-2])
    return tuple(scan.u.new_empty(0) if x is None else torch.empty_like(x) for x in scan.tensors())


define(
    f"selective_scan({_SCAN}, bool save_states, bool traced) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _save,
    _gradient,
)
define_backward(
    f"selective_scan_backward(Tensor grad_out, Tensor? grad_last_state, {_SCAN}, Tensor states, Tensor used) "
    f"-> ({', '.join(['Tensor'] * 9)})",
    _backward,
    _backward_fake,
)
