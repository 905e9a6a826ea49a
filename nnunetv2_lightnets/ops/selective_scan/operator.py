"""The scans as operators of torch: autograd, fake kernels and backends behind them, for eager and compiled code alike.

Operators are strict where the public functions are lenient: they take exactly the dtypes that the backends read, so
that no half-precision tensor is ever read as something else under autocast.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.ops.library import define, define_backward
from nnunetv2_lightnets.ops.selective_scan.dispatch import Backend, choose, forced_backend
from nnunetv2_lightnets.ops.selective_scan.layout import compute_dtype, in_layout_of, n_chunks

_SCAN = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
_DIRECTIONAL = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias"


def _check(u: Tensor, tokens: tuple[Tensor | None, ...], parameters: tuple[Tensor | None, ...]) -> None:
    """Tensors with tokens have the dtype of ``u``, parameters the compute dtype, and all are on one device."""
    dtype = compute_dtype(u)
    for tensor in tokens:
        if tensor is not None and (tensor.dtype != u.dtype or tensor.device != u.device):
            raise LightNetsError(
                f"selective scan: got {tensor.dtype} on {tensor.device} beside u in {u.dtype} on {u.device}; "
                f"call nnunetv2_lightnets.ops.selective_scan, which casts, and move all arguments to one device"
            )
    for tensor in parameters:
        if tensor is not None and (tensor.dtype != dtype or tensor.device != u.device):
            raise LightNetsError(
                f"selective scan: got a parameter in {tensor.dtype} on {tensor.device}, needs {dtype} on {u.device}; "
                f"call nnunetv2_lightnets.ops.selective_scan, which casts, and move all arguments to one device"
            )


def _gradients(results: tuple[Tensor | None, ...], arguments: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Gradients as the fake kernels promise them: laid out as their arguments, and empty tensors for absent ones."""
    nothing = arguments[0].new_empty if arguments[0] is not None else torch.empty
    return tuple(
        nothing(0) if argument is None or result is None else in_layout_of(argument, result)
        for result, argument in zip(results, arguments, strict=True)
    )


def _holds_no_states(states: Tensor, backend: Backend) -> bool:
    """Whether ``backend`` must compute the states of a forward pass itself.

    So it is where that pass did not know that gradients would be asked for, and where mamba-ssm, which has none to
    give, computed it, but does not compute the gradients.
    """
    if not states.numel():
        return True
    mamba_ssm = sys.modules.get("nnunetv2_lightnets.ops.selective_scan.mamba_ssm")
    return mamba_ssm is not None and backend.NAME != mamba_ssm.NAME and mamba_ssm.holds_no_states(states)


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(u, (delta, B, C, z), (A, D, delta_bias))
    scan = (u, delta, A, B, C, D, z, delta_bias)
    out, last_state, states = choose(forced_backend(), *scan).forward(*scan, delta_softplus, save_states)
    return in_layout_of(u, out), last_state.contiguous(), states


def _scan_fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, length = u.shape
    state = A.shape[1]
    # Flat, as a dimension of n_chunks(length) would tell the exporter that a dynamic length has more than one chunk.
    saved = batch * n_chunks(length) * channels * state if save_states else 0
    return torch.empty_like(u), A.new_empty(batch, channels, state), A.new_empty(saved)


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)
    # Gradients on a GPU are computed in another thread, which does not see what is forced in this one. A graph that is
    # traced here runs later, when something else may be forced.
    ctx.forced = "" if torch.compiler.is_compiling() else forced_backend()


def _scan_grad(ctx: Any, grad_out: Tensor | None, grad_last_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(tensors[0])
    operator = torch.ops.nnunetv2_lightnets.selective_scan_backward
    gradients = operator(grad_out, grad_last_state, *tensors, ctx.delta_softplus, states, ctx.forced)
    return (*_where_given(gradients, tensors), None, None)


def _where_given(gradients: tuple[Tensor, ...], tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else gradient for gradient, tensor in zip(gradients, tensors, strict=True)]


def _scan_backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    states: Tensor,
    backend: str,
) -> tuple[Tensor, ...]:
    _check(u, (grad_out, delta, B, C, z), (A, D, delta_bias, grad_last_state, states))
    scan = (u, delta, A, B, C, D, z, delta_bias)
    chosen = choose(backend or forced_backend(), *scan)
    if _holds_no_states(states, chosen):
        states = chosen.forward(*scan, delta_softplus, True)[2]
    gradients = chosen.backward(grad_out, grad_last_state, *scan, delta_softplus, states)
    return _gradients(gradients, scan)


def _scan_backward_fake(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    states: Tensor,
    backend: str,
) -> tuple[Tensor, ...]:
    return tuple(u.new_empty(0) if x is None else torch.empty_like(x) for x in (u, delta, A, B, C, D, z, delta_bias))


def _directional(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: Tensor,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    _check(u, (delta, B, C), (A, D, delta_bias))
    scan = (u, delta, A, B, C, D, delta_bias)
    chosen = choose(forced_backend(), u, delta, A, B, C, D, None, delta_bias)
    y, states = chosen.directional_forward(*scan, delta_softplus, order, save_states)
    return in_layout_of(u, y), states


def _directional_fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: Tensor,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    directions, channels, state = A.shape
    saved = u.shape[0] * directions * n_chunks(u.shape[2]) * channels * state if save_states else 0
    return torch.empty_like(u), A.new_empty(saved)


def _directional_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, order, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, order, output[1])
    ctx.set_materialize_grads(False)
    ctx.forced = "" if torch.compiler.is_compiling() else forced_backend()


def _directional_grad(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *tensors, order, states = ctx.saved_tensors
    if grad_y is None:
        return (None,) * 10
    operator = torch.ops.nnunetv2_lightnets.directional_scan_backward
    gradients = operator(grad_y, *tensors, ctx.delta_softplus, order, states, ctx.forced)
    return (*_where_given(gradients, tensors), None, None, None)


def _directional_backward(
    grad_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: Tensor,
    states: Tensor,
    backend: str,
) -> tuple[Tensor, ...]:
    _check(u, (grad_y, delta, B, C), (A, D, delta_bias, states))
    scan = (u, delta, A, B, C, D, delta_bias)
    chosen = choose(backend or forced_backend(), u, delta, A, B, C, D, None, delta_bias)
    if _holds_no_states(states, chosen):
        states = chosen.directional_forward(*scan, delta_softplus, order, True)[1]
    gradients = chosen.directional_backward(grad_y, *scan, delta_softplus, order, states)
    return _gradients(gradients, scan)


def _directional_backward_fake(
    grad_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: Tensor,
    states: Tensor,
    backend: str,
) -> tuple[Tensor, ...]:
    return tuple(u.new_empty(0) if x is None else torch.empty_like(x) for x in (u, delta, A, B, C, D, delta_bias))


define(
    f"selective_scan({_SCAN}, bool delta_softplus, bool save_states) -> (Tensor, Tensor, Tensor)",
    _scan,
    _scan_fake,
    _scan_setup,
    _scan_grad,
)
define_backward(
    f"selective_scan_backward(Tensor grad_out, Tensor? grad_last_state, {_SCAN}, bool delta_softplus, Tensor states, "
    f"str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _scan_backward,
    _scan_backward_fake,
)
define(
    f"directional_scan({_DIRECTIONAL}, bool delta_softplus, Tensor order, bool save_states) -> (Tensor, Tensor)",
    _directional,
    _directional_fake,
    _directional_setup,
    _directional_grad,
)
define_backward(
    f"directional_scan_backward(Tensor grad_y, {_DIRECTIONAL}, bool delta_softplus, Tensor order, Tensor states, "
    f"str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _directional_backward,
    _directional_backward_fake,
)
