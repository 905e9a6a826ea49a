"""Backend "mamba_ssm": the CUDA kernel of the mamba-ssm package, where that is installed and works.

Only its compiled module ``selective_scan_cuda`` is used: the package around it imports much else, and fails where that
is missing. Builds of it fail in many ways, so the backend is available only if it computes a small scan correctly.

The kernel keeps states every 2048 tokens in a form of its own. They are not passed on to the backward pass, which runs
the kernel's forward pass again (as the package itself does in its fused block).

Source: https://github.com/state-spaces/mamba (Apache-2.0), mamba_ssm/ops/selective_scan_interface.py for the interface.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nnunetv2_lightnets.ops.selective_scan import chunked, reference
from nnunetv2_lightnets.ops.selective_scan.gather import with_orders, with_orders_backward
from nnunetv2_lightnets.ops.selective_scan.record import Gradients, Scan
from nnunetv2_lightnets.ops.tensors import in_layout_of, in_one_line

NAME = "mamba_ssm"
DEVICE = "cuda"
MOST_STATES = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _kernel() -> Any:
    return importlib.import_module("selective_scan_cuda")


@cache
def unavailable() -> str | None:
    """Why the kernel cannot run on this machine, None if it computes a small scan and its gradients correctly."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    # A broken build may fail in any way, and must only cost this backend.
    try:
        _kernel()
    except Exception as error:
        return f"mamba-ssm's compiled module selective_scan_cuda cannot be imported ({in_one_line(error)})"
    try:
        return _probe()
    except Exception as error:
        return f"mamba-ssm's kernel fails on a small scan ({in_one_line(error)})"


def _probe() -> str | None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    u, delta, z, grad = (random(2, 4, 9) for _ in range(4))
    B, C = random(2, 2, 3, 9), random(2, 2, 3, 9)
    scan = Scan(u, delta, -random(4, 3).exp(), B, C, random(4), z, random(4), delta_softplus=True)
    out, last_state, states = forward(scan, True)
    results = (out, last_state, *backward(scan, (grad, None), states))
    out, last_state, states = reference.forward(scan, True)
    expected = (out, last_state, *reference.backward(scan, (grad, None), states))
    for result, wanted in zip(results, expected, strict=True):
        if wanted is not None and (result is None or not torch.allclose(result, wanted, rtol=1e-3, atol=1e-3)):
            return "mamba-ssm's kernel gives wrong results for a small scan"
    return None


def refuses(scan: Scan) -> str | None:
    """Why the kernel cannot take this call, None if it can."""
    if scan.u.device.type != DEVICE:
        return f"u is on {scan.u.device}, and it computes on CUDA devices"
    if scan.u.dtype not in _DTYPES:
        return f"u is {scan.u.dtype}, and it reads float32, float16 and bfloat16"
    if scan.A.shape[-1] > MOST_STATES:
        return f"A has {scan.A.shape[-1]} states, and it takes up to {MOST_STATES}"
    if scan.initial_state is not None:
        return "an initial_state is given, and its scans start at zero"
    return None


def _rows(x: Tensor) -> Tensor:
    """``x`` with tokens as neighbours in memory, as the kernel reads them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _run(scan: Scan) -> tuple[tuple[Tensor | None, ...], Tensor, Tensor, Tensor]:
    """Arguments as the kernel reads them, gated output, output before the gate, and the kernel's own states."""
    u, delta, B, C, z = (None if x is None else _rows(x) for x in (scan.u, scan.delta, scan.B, scan.C, scan.z))
    A, D, delta_bias = (None if x is None else x.contiguous() for x in (scan.A, scan.D, scan.delta_bias))
    arguments = (u, delta, A, B, C, D, z, delta_bias)
    out, own_states, *gated = _kernel().fwd(*arguments, scan.delta_softplus)
    return arguments, gated[0] if gated else out, out, own_states


@with_orders
def forward(scan: Scan, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, D, L) and last state (B, [K,] D, N); nothing is saved."""
    _, out, _, own_states = _run(scan)
    last_state = own_states[:, :, -1, 1::2].clone()  # (B, D, N); decays and states alternate
    return in_layout_of(scan.u, out), last_state, scan.A.new_empty(0)


@with_orders_backward
def backward(scan: Scan, grads: tuple[Tensor, Tensor | None], states: Tensor) -> Gradients:
    """Gradients of the scan's tensors."""
    grad_out, grad_last_state = grads
    if grad_last_state is not None:  # which the kernel does not take
        return chunked.backward(scan, grads, chunked.forward(scan, True)[2])
    arguments, _, out, own_states = _run(scan)
    gate_output, gate_gradient, recompute_gated_output = None if scan.z is None else out, None, False
    du, ddelta, dA, dB, dC, dD, ddelta_bias, *dz = _kernel().bwd(
        *(*arguments, _rows(grad_out), own_states, gate_output, gate_gradient),
        *(scan.delta_softplus, recompute_gated_output),
    )
    return scan.gradients(du, ddelta, dA, dB, dC, dD, dz[0] if dz else None, ddelta_bias, None)
