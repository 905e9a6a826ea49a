"""The selective scan (S6) of Mamba, and scans of an image in several directions, on any device.

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752, section 3;
argument names and meaning as in mamba-ssm (https://github.com/state-spaces/mamba, Apache-2.0). Directional scans: Liu
et al., "VMamba: Visual State Space Model", arXiv:2401.10166, section 4.2 (SS2D).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.ops.selective_scan import operator as operator
from nnunetv2_lightnets.ops.selective_scan.dispatch import available_backends, use_backend
from nnunetv2_lightnets.ops.selective_scan.record import Tensors

__all__ = ["available_backends", "directional_scan", "selective_scan", "use_backend"]


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: Literal[False] = False,
    initial_state: Tensor | None = None,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    return_last_state: Literal[True],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan sequences by a linear recurrence whose coefficients depend on the input.

    With ``s = softplus(delta + delta_bias)`` (or without softplus), for every channel ``d`` of a group ``g``:
    ``h[t] = exp(s[d, t] A[d]) * h[t - 1] + s[d, t] u[d, t] B[g, :, t]`` and
    ``out[d, t] = (C[g, :, t] . h[t] + D[d] u[d, t]) * silu(z[d, t])``, starting with ``h = initial_state`` or 0.

    Any strides are taken. Views ``x.transpose(1, 2)`` of (B, L, D) memory are the fastest on CPUs, and the output
    keeps the memory layout of ``u``. Half-precision tensors are computed in float32, under autocast, too; tensors of
    different floating dtypes are brought to the wider one.

    Args:
        u: Sequences, (B, D, L).
        delta: Step sizes, (B, D, L).
        A: Real state matrix (its diagonals), (D, N); negative in a stable scan.
        B: Input vectors, (B, N, L), or (B, G, N, L) where each of G groups serves D / G neighbouring channels.
        C: Output vectors, in the shape of ``B``.
        D: Weight of the input in the output, (D,).
        z: Gate, (B, D, L).
        delta_bias: Added to ``delta``, (D,).
        delta_softplus: Whether softplus is applied to ``delta + delta_bias``.
        return_last_state: Whether to return the state after the last token, too.
        initial_state: The state before the first token, (B, D, N), such as the last state of the tokens before; None
            for zero.

    Returns:
        The output (B, D, L) in the dtype of ``u``; with ``return_last_state``, also (B, D, N) in float32 (float64 for
        float64 inputs).

    A sequence in two parts:

        >>> first, state = selective_scan(u[..., :9], delta[..., :9], A, B[..., :9], C[..., :9], return_last_state=True)
        >>> rest = selective_scan(u[..., 9:], delta[..., 9:], A, B[..., 9:], C[..., 9:], initial_state=state)

    Raises:
        LightNetsError: For shapes or dtypes that do not fit, or a forced backend that cannot take the call.
    """
    if B.dim() == 3:
        B = B.unsqueeze(1)
    if C.dim() == 3:
        C = C.unsqueeze(1)
    out, last_state = _run((u, delta, A, B, C, D, z, delta_bias, initial_state), None, delta_softplus)
    return (out, last_state) if return_last_state else out


def directional_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    order: Tensor,
) -> Tensor:
    """Scan an image along K paths, each with its own coefficients, and sum the outputs pixel by pixel.

    For every direction ``k``, tokens are taken in the order ``order[k]``, scanned as in :func:`selective_scan`, and put
    back in image order. Coefficients come in image order, too, as they are made pixel by pixel.

    Args:
        u: Flattened images, (B, D, L).
        delta: Step sizes of every direction, (B, K, D, L).
        A: Real state matrices (their diagonals), (K, D, N).
        B: Input vectors, (B, K, N, L).
        C: Output vectors, (B, K, N, L).
        D: Weight of the input in the output, (K, D).
        delta_bias: Added to ``delta``, (K, D).
        delta_softplus: Whether softplus is applied to ``delta + delta_bias``.
        order: Image index of every direction's t-th token, (K, L) in int32; each row must be a permutation of
            ``range(L)``. See :func:`nnunetv2_lightnets.ops.scan_order`; an order from elsewhere is checked when it is
            first used, for which a GPU has to be waited for.

    Returns:
        (B, D, L) in image order, in the dtype and memory layout of ``u``.

    Raises:
        LightNetsError: For shapes, dtypes or an order that do not fit, or a forced backend that cannot take the call.
    """
    return _run((u, delta, A, B, C, D, None, delta_bias, None), order, delta_softplus)[0]


def _run(tensors: Tensors, order: Tensor | None, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """Output in the dtype of ``u``, and last state, of a scan whose tensors may have any floating dtypes."""
    scan = _cast(tensors)
    save_states = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in scan)
    operator = torch.ops.nnunetv2_lightnets.selective_scan
    out, last_state, *_ = operator(*scan, order, delta_softplus, save_states, torch.compiler.is_compiling())
    return _to(out, tensors[0].dtype), last_state


def _cast(tensors: Tensors) -> Tensors:
    """Tensors with tokens in their widest dtype, parameters and the initial state in the compute dtype."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = tensors
    for tensor in tensors:
        if tensor is not None and not tensor.is_floating_point():
            raise LightNetsError(f"selective scan: got {tensor.dtype}; arguments must be real floating-point tensors")
    dtype = u.dtype
    for tensor in (delta, B, C, z):
        if tensor is not None and tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        _to(u, dtype),
        _to(delta, dtype),
        _to(A, compute),
        _to(B, dtype),
        _to(C, dtype),
        None if D is None else _to(D, compute),
        None if z is None else _to(z, dtype),
        None if delta_bias is None else _to(delta_bias, compute),
        None if initial_state is None else _to(initial_state, compute),
    )


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # comparing costs a fraction of the call
