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
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan sequences by a linear recurrence whose coefficients depend on the input.

    With ``s = softplus(delta + delta_bias)`` (or without softplus), for every channel ``d`` of a group ``g``:
    ``h[t] = exp(s[d, t] A[d]) * h[t - 1] + s[d, t] u[d, t] B[g, :, t]`` and
    ``out[d, t] = (C[g, :, t] . h[t] + D[d] u[d, t]) * silu(z[d, t])``, starting with ``h = 0``.

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

    Returns:
        The output (B, D, L) in the dtype of ``u``; with ``return_last_state``, also (B, D, N) in float32 (float64 for
        float64 inputs).

    Raises:
        LightNetsError: For shapes or dtypes that do not fit, or a forced backend that cannot take the call.
    """
    _check_shape("u", u, (None, None, None))
    batch, channels, length = u.shape
    _check_shape("A", A, (channels, None))
    state = A.shape[1]
    _check_shape("delta", delta, (batch, channels, length))
    if B.dim() == 3:
        B = B.unsqueeze(1)
    if C.dim() == 3:
        C = C.unsqueeze(1)
    _check_shape("B", B, (batch, None, state, length))
    _check_shape("C", C, (batch, B.shape[1], state, length))
    _check_shape("D", D, (channels,))
    _check_shape("z", z, (batch, channels, length))
    _check_shape("delta_bias", delta_bias, (channels,))
    if channels % B.shape[1]:
        raise LightNetsError(
            f"selective_scan: B has {B.shape[1]} groups for {channels} channels; their number must divide the channels"
        )
    scan = _cast(u, delta, A, B, C, D, z, delta_bias)
    out, last_state, _ = torch.ops.nnunetv2_lightnets.selective_scan(*scan, delta_softplus, _needs_grad(scan))
    out = _to(out, u.dtype)
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
            ``range(L)``, which not every backend checks. See :func:`nnunetv2_lightnets.ops.scan_order`.

    Returns:
        (B, D, L) in image order, in the dtype and memory layout of ``u``.

    Raises:
        LightNetsError: For shapes or dtypes that do not fit, or a forced backend that cannot take the call.
    """
    _check_shape("u", u, (None, None, None))
    batch, channels, length = u.shape
    _check_shape("A", A, (None, channels, None))
    directions, _, state = A.shape
    _check_shape("delta", delta, (batch, directions, channels, length))
    _check_shape("B", B, (batch, directions, state, length))
    _check_shape("C", C, (batch, directions, state, length))
    _check_shape("D", D, (directions, channels))
    _check_shape("delta_bias", delta_bias, (directions, channels))
    _check_shape("order", order, (directions, length))
    if order.dtype != torch.int32 or order.device != u.device:
        raise LightNetsError(
            f"directional_scan: order is {order.dtype} on {order.device}; it must be torch.int32 on {u.device}"
        )
    u_cast, delta, A, B, C, D, _, delta_bias = _cast(u, delta, A, B, C, D, None, delta_bias)
    scan = (u_cast, delta, A, B, C, D, delta_bias)
    y, _ = torch.ops.nnunetv2_lightnets.directional_scan(*scan, delta_softplus, order, _needs_grad(scan))
    return _to(y, u.dtype)


def _check_shape(name: str, tensor: Tensor | None, expected: tuple[int | None, ...]) -> None:
    """Compare a shape with the expected one, in which None stands for any positive size."""
    if tensor is None or tensor.shape == expected:
        return
    fits = tensor.dim() == len(expected) and all(
        size > 0 if wanted is None else size == wanted for size, wanted in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        wanted_shape = ", ".join("any" if size is None else str(size) for size in expected)
        raise LightNetsError(f"selective scan: {name} has shape {tuple(tensor.shape)}, expected ({wanted_shape})")


def _cast(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Tensors with tokens in their widest dtype, parameters in the compute dtype."""
    for tensor in (u, delta, A, B, C, D, z, delta_bias):
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
    )


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # comparing costs a fraction of the call


def _needs_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether autograd will ask for gradients, so that states are worth saving."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
