"""Backend "native": the selective scan on CPUs, in C (``ops/csrc``, see ``ops/native_library.py``)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from nnunetv2_lightnets.ops.native_library import (
    DTYPES,
    ScanStruct,
    check_status,
    dense,
    describe,
    library,
    new_like,
    pointer,
    resolved,
    unavailable,
    unreadable,
)
from nnunetv2_lightnets.ops.selective_scan.record import Gradients, Scan, saved_states
from nnunetv2_lightnets.ops.tensors import in_layout_of

__all__ = ["NAME", "backward", "forward", "refuses", "unavailable"]

NAME = "native"
_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def refuses(scan: Scan) -> str | None:
    """Why the kernel cannot take this call, None if it can."""
    return unreadable(_NAMES, scan.tensors())


def _readable(scan: Scan) -> tuple[Tensor | None, ...]:
    """The scan's tensors as the kernel reads them, parameters and the initial state dense."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = scan.tensors()
    return (
        *(resolved(x) for x in (u, delta)),
        dense(A, scan.dtype),
        *(resolved(x) for x in (B, C)),
        None if D is None else dense(D, scan.dtype),
        None if z is None else resolved(z),
        None if delta_bias is None else dense(delta_bias, scan.dtype),
        None if initial_state is None else dense(initial_state, scan.dtype),
    )


def _arguments(scan: Scan, tensors: tuple[Tensor | None, ...], order: Tensor | None) -> Any:
    """The scan in the form that C takes: pointers, so whoever uses it keeps ``tensors`` and ``order`` alive."""
    u, delta, A, B, C, D, z, delta_bias, _ = tensors
    batch, channels, length = scan.u.shape
    return ScanStruct(
        batch=batch,
        directions=scan.directions,
        groups=scan.B.shape[1] // scan.directions,
        channels=channels,
        length=length,
        states=scan.A.shape[-1],
        softplus=scan.delta_softplus,
        threads=torch.get_num_threads(),
        order=pointer(order),
        u=describe(u),
        delta=describe(delta, outer=order is not None),
        z=describe(z),
        B=describe(B, outer=True),
        C=describe(C, outer=True),
        A=pointer(A),
        D=pointer(D),
        delta_bias=pointer(delta_bias),
    )


def _sum_dtype(scan: Scan) -> torch.dtype:
    """Dtype of what is summed over directions one after the other: rounded to half precision only at the end."""
    return scan.dtype if scan.directions > 1 else scan.u.dtype


def forward(scan: Scan, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, D, L), last state (B, [K,] D, N) and the states before every chunk, (B, K, chunk, N, D) flat."""
    tensors, order = _readable(scan), None if scan.order is None else scan.order.contiguous()
    out = new_like(scan.u, _sum_dtype(scan))
    last_state = torch.empty(scan.state_shape, dtype=scan.dtype, device="cpu")
    states = torch.empty(scan.saved_numbers if save_states else 0, dtype=scan.dtype, device="cpu")
    arguments = _arguments(scan, tensors, order)
    arguments.out = describe(out)
    arguments.initial_state = pointer(tensors[-1])
    arguments.last_state = pointer(last_state)
    arguments.checkpoints = pointer(states) if save_states else None
    check_status(library().ln_scan_forward(ctypes.byref(arguments), DTYPES[scan.dtype]))
    return out.to(scan.u.dtype), last_state, states


def backward(scan: Scan, grads: tuple[Tensor, Tensor | None], states: Tensor) -> Gradients:
    """Gradients of the scan's tensors; states inside a chunk are computed again."""
    tensors, order = _readable(scan), None if scan.order is None else scan.order.contiguous()
    grad_out, states = resolved(grads[0]), saved_states(scan, states, forward).contiguous()
    grad_last_state = None if grads[1] is None else dense(grads[1], scan.dtype)
    du, ddelta = new_like(scan.u, _sum_dtype(scan)), new_like(scan.delta)
    dB, dC = new_like(scan.B, scan.dtype), new_like(scan.C, scan.dtype)
    dz = None if scan.z is None else new_like(scan.z)
    _, _, A, _, _, D, _, delta_bias, initial_state = tensors
    dA, dD, ddelta_bias, dinitial_state = (
        None if x is None else torch.empty_like(x) for x in (A, D, delta_bias, initial_state)
    )
    arguments = _arguments(scan, tensors, order)
    arguments.grad_out = describe(grad_out)
    arguments.last_state = pointer(grad_last_state)
    arguments.checkpoints = pointer(states)
    arguments.du, arguments.ddelta = describe(du), describe(ddelta, outer=order is not None)
    arguments.dz = describe(dz)
    arguments.dB, arguments.dC = describe(dB, outer=True), describe(dC, outer=True)
    arguments.dA, arguments.dD, arguments.ddelta_bias = pointer(dA), pointer(dD), pointer(ddelta_bias)
    arguments.initial_state = pointer(dinitial_state)
    check_status(library().ln_scan_backward(ctypes.byref(arguments), DTYPES[scan.dtype]))
    return (
        du.to(scan.u.dtype),
        ddelta,
        _laid_out(scan.A, dA),
        dB.to(scan.B.dtype),
        dC.to(scan.C.dtype),
        _laid_out(scan.D, dD),
        dz,
        _laid_out(scan.delta_bias, ddelta_bias),
        _laid_out(scan.initial_state, dinitial_state),
    )


def _laid_out(x: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The dense gradient of a parameter in the memory layout of that."""
    if x is None or gradient is None or x.is_contiguous():
        return gradient
    return in_layout_of(x, gradient)
