"""Backend "native": the selective scan on CPUs, in C (``ops/csrc``, see ``ops/native_library.py``)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from nnunetv2_lightnets.ops import native_library as lib
from nnunetv2_lightnets.ops.selective_scan.record import Gradients, Scan, saved_states
from nnunetv2_lightnets.ops.tensors import in_layout_of

NAME = "native"
unavailable = lib.unavailable
_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def refuses(scan: Scan) -> str | None:
    """Why the kernel cannot take this call, None if it can."""
    return lib.unreadable(_NAMES, scan.tensors())


def _arguments(scan: Scan) -> Any:
    """The scan in the form that C takes, parameters dense."""
    u, delta, B, C, z = (None if x is None else lib.resolved(x) for x in (scan.u, scan.delta, scan.B, scan.C, scan.z))
    A, D, delta_bias = (None if x is None else lib.dense(x, scan.dtype) for x in (scan.A, scan.D, scan.delta_bias))
    order = None if scan.order is None else scan.order.contiguous()
    batch, channels, length = scan.u.shape
    arguments: Any = lib.ScanStruct(
        batch=batch,
        directions=scan.directions,
        groups=scan.B.shape[1] // scan.directions,
        channels=channels,
        length=length,
        states=scan.A.shape[-1],
        softplus=scan.delta_softplus,
        threads=torch.get_num_threads(),
        order=lib.pointer(order),
        u=lib.describe(u),
        delta=lib.describe(delta, outer=order is not None),
        z=lib.describe(z),
        B=lib.describe(B, outer=True),
        C=lib.describe(C, outer=True),
        A=lib.pointer(A),
        D=lib.pointer(D),
        delta_bias=lib.pointer(delta_bias),
    )
    arguments.tensors = u, delta, B, C, z, A, D, delta_bias, order  # alive as long as the pointers to them
    return arguments


def _sum_dtype(scan: Scan) -> torch.dtype:
    """Dtype of what is summed over directions one after the other: rounded to half precision only at the end."""
    return scan.dtype if scan.directions > 1 else scan.u.dtype


def forward(scan: Scan, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, D, L), last state (B, [K,] D, N) and the states before every chunk, (B, K, chunk, N, D) flat."""
    initial_state = None if scan.initial_state is None else lib.dense(scan.initial_state, scan.dtype)
    out = lib.new_like(scan.u, _sum_dtype(scan))
    last_state = torch.empty(scan.state_shape, dtype=scan.dtype, device="cpu")
    states = torch.empty(scan.saved_numbers if save_states else 0, dtype=scan.dtype, device="cpu")
    arguments = _arguments(scan)
    arguments.out = lib.describe(out)
    arguments.initial_state, arguments.last_state = lib.pointer(initial_state), lib.pointer(last_state)
    arguments.checkpoints = lib.pointer(states) if save_states else None
    lib.check_status(lib.library().ln_scan_forward(ctypes.byref(arguments), lib.DTYPES[scan.dtype]))
    return out.to(scan.u.dtype), last_state, states


def backward(scan: Scan, grads: tuple[Tensor, Tensor | None], states: Tensor) -> Gradients:
    """Gradients of the scan's tensors; states inside a chunk are computed again."""
    grad_out, states = lib.resolved(grads[0]), saved_states(scan, states, forward).contiguous()
    grad_last_state = None if grads[1] is None else lib.dense(grads[1], scan.dtype)
    du, ddelta = lib.new_like(scan.u, _sum_dtype(scan)), lib.new_like(scan.delta)
    dB, dC = lib.new_like(scan.B, scan.dtype), lib.new_like(scan.C, scan.dtype)
    dz = None if scan.z is None else lib.new_like(scan.z)
    dA, dD, ddelta_bias, dinitial_state = (
        None if x is None else x.new_empty(x.shape) for x in (scan.A, scan.D, scan.delta_bias, scan.initial_state)
    )
    arguments = _arguments(scan)
    arguments.grad_out = lib.describe(grad_out)
    arguments.last_state = lib.pointer(grad_last_state)
    arguments.checkpoints = lib.pointer(states)
    arguments.du, arguments.ddelta = lib.describe(du), lib.describe(ddelta, outer=scan.order is not None)
    arguments.dz = lib.describe(dz)
    arguments.dB, arguments.dC = lib.describe(dB, outer=True), lib.describe(dC, outer=True)
    arguments.dA, arguments.dD, arguments.ddelta_bias = lib.pointer(dA), lib.pointer(dD), lib.pointer(ddelta_bias)
    arguments.initial_state = lib.pointer(dinitial_state)
    lib.check_status(lib.library().ln_scan_backward(ctypes.byref(arguments), lib.DTYPES[scan.dtype]))
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
    return gradient if x is None or gradient is None or x.is_contiguous() else in_layout_of(x, gradient)
