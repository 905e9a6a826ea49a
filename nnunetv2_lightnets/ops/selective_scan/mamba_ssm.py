"""Backend "mamba_ssm": the CUDA kernel of the mamba-ssm package, where that is installed and works.

Only its compiled module ``selective_scan_cuda`` is used: the package around it imports much else, and fails where that
is missing. Builds of it fail in many ways, so the backend is available only if a real call answers, and rightly so.

The kernel keeps states every 2048 tokens in a form of its own. They are not passed on to the backward pass, which runs
the kernel's forward pass again (as the package itself does in its fused block); so ``states`` hold nothing here but a
mark, :func:`holds_no_states`, in case another backend computes the gradients.

Source: https://github.com/state-spaces/mamba (Apache-2.0), mamba_ssm/ops/selective_scan_interface.py for the interface.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nnunetv2_lightnets.ops.selective_scan import chunked, reference
from nnunetv2_lightnets.ops.selective_scan.dispatch import in_one_line
from nnunetv2_lightnets.ops.selective_scan.layout import directional_from_plain, n_chunks

NAME = "mamba_ssm"
DEVICE = "cuda"
MOST_STATES = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _kernel() -> Any:
    return importlib.import_module("selective_scan_cuda")


@cache
def unavailable() -> str | None:
    """Why the kernel cannot run on this machine, None if it answers a small scan and its gradients rightly."""
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
    scan = (u, delta, -random(4, 3).exp(), B, C, random(4), z, random(4), True)
    out, last_state, states = forward(*scan, True)
    results = (out, last_state, *backward(grad, None, *scan, states))
    out, last_state, states = reference.forward(*scan, True)
    expected = (out, last_state, *reference.backward(grad, None, *scan, states))
    for result, wanted in zip(results, expected, strict=True):
        if result is None or wanted is None or not torch.allclose(result, wanted, rtol=1e-3, atol=1e-3):
            return "mamba-ssm's kernel gives wrong results for a small scan"
    return None


def refuses(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> str | None:
    """Why the kernel cannot take this call, None if it can."""
    if u.device.type != DEVICE:
        return f"u is on {u.device}, and it computes on CUDA devices"
    if u.dtype not in _DTYPES:
        return f"u is {u.dtype}, and it reads float32, float16 and bfloat16"
    if A.shape[-1] > MOST_STATES:
        return f"A has {A.shape[-1]} states, and it takes up to {MOST_STATES}"
    return None


def _rows(x: Tensor) -> Tensor:
    """``x`` with tokens as neighbours in memory, as the kernel reads them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _run(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[tuple[Tensor | None, ...], Tensor, Tensor, Tensor]:
    """Arguments as the kernel reads them, gated output, output before the gate, and the kernel's own states."""
    arguments = (
        *(_rows(x) for x in (u, delta)),
        A.contiguous(),
        *(_rows(x) for x in (B, C)),
        None if D is None else D.contiguous(),
        None if z is None else _rows(z),
        None if delta_bias is None else delta_bias.contiguous(),
    )
    out, own_states, *gated = _kernel().fwd(*arguments, delta_softplus)
    return arguments, gated[0] if gated else out, out, own_states


def forward(
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
    """Output (B, D, L), last state (B, D, N), and a tensor in the size of saved states that holds none."""
    _, out, _, own_states = _run(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    last_state = own_states[:, :, -1, 1::2].clone()  # (B, D, N); decays and states alternate
    states = A.new_empty(u.shape[0] * n_chunks(u.shape[2]) * A.numel() if save_states else 0)
    states[:1] = torch.nan
    return out, last_state, states


def holds_no_states(states: Tensor) -> bool:
    """Whether ``states`` come from this backend, so that another one must compute its own; may wait for the GPU."""
    return "selective_scan_cuda" in sys.modules and bool(states[:1].isnan().any())


def backward(
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
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias."""
    if grad_last_state is not None:  # which the kernel does not take
        scan = (u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return chunked.backward(grad_out, grad_last_state, *scan, chunked.forward(*scan, True)[2])
    arguments, _, out, own_states = _run(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    gate_output, gate_gradient, recompute_gated_output = None if z is None else out, None, False
    du, ddelta, dA, dB, dC, dD, ddelta_bias, *dz = _kernel().bwd(
        *arguments,
        _rows(grad_out),
        own_states,
        gate_output,
        gate_gradient,
        delta_softplus,
        recompute_gated_output,
    )
    return (
        du,
        ddelta,
        dA,
        dB.to(B.dtype),
        dC.to(C.dtype),
        None if D is None else dD,
        None if z is None else dz[0],
        None if delta_bias is None else ddelta_bias,
    )


directional_forward, directional_backward = directional_from_plain(forward, backward)
