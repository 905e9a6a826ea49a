"""What the backends share: the chunk length, the compute dtype, and directional scans made of plain ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 64
"""Tokens between two states that the forward pass saves for the backward pass."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """Float64 for float64, else float32: half-precision inputs accumulate in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def n_chunks(length: int) -> int:
    """Chunks in a sequence of ``length`` tokens; the last one may be short."""
    return (length + CHUNK - 1) // CHUNK


def in_layout_of(like: Tensor, result: Tensor) -> Tensor:
    """``result`` in the dtype and memory layout of ``torch.empty_like(like)``, copied only where it is not so."""
    strides = torch.empty_like(like, device="meta").stride()
    if result.dtype == like.dtype and result.stride() == strides:
        return result
    return torch.empty_like(like).copy_(result)


def take_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of ``x`` in every direction's own order.

    Args:
        x: (B, D, L), shared by the directions, or (B, K, D, L), one for each.
        order: (K, L), the image index of every direction's t-th token.

    Returns:
        (B, K, D, L), in (B, L, K, D) memory: whole rows of channels are copied, which is fast where the channels of
        ``x`` are neighbours in memory, too.
    """
    directions, length = order.shape
    if x.dim() == 3:
        rows = x.transpose(1, 2)  # (B, L, D)
        index = order.T  # (L, K), row of every token
    elif x.stride(1) > x.stride(3):
        rows = x.transpose(2, 3).flatten(1, 2)  # (B, K * L, D)
        index = order.T + torch.arange(0, directions * length, length, device=order.device)
    else:
        rows = x.permute(0, 3, 1, 2).flatten(1, 2)  # (B, L * K, D)
        index = order.T * directions + torch.arange(directions, device=order.device)
    batch, per_item, channels = rows.shape
    index = index.flatten() + torch.arange(0, batch * per_item, per_item, device=order.device)[:, None]  # (B, L * K)
    taken = rows.reshape(-1, channels).index_select(0, index.flatten())
    return taken.view(batch, length, directions, channels).permute(0, 2, 3, 1)


def put_tokens(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of :func:`take_tokens`: tokens of ``x`` (B, K, D, L) back in image order."""
    inverse = torch.empty_like(order)
    positions = torch.arange(order.shape[1], dtype=order.dtype, device=order.device).expand_as(order)
    inverse.scatter_(1, order.long(), positions)
    return take_tokens(x, inverse)


Forward = Callable[..., tuple[Tensor, Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor | None, ...]]
DirectionalForward = Callable[..., tuple[Tensor, Tensor]]


def directional_from_plain(forward: Forward, backward: Backward) -> tuple[DirectionalForward, Backward]:
    """Directional scans by gathering, one plain scan with a group for each direction, and summing in image order."""

    def fold(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        order: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """The arguments of the plain scan: (B, K * D, L) sequences, (B, K, N, L) inputs, and no gate."""
        return (
            take_tokens(u, order).flatten(1, 2),
            take_tokens(delta, order).flatten(1, 2),
            A.flatten(0, 1),
            take_tokens(B, order),
            take_tokens(C, order),
            None if D is None else D.flatten(),
            None,
            None if delta_bias is None else delta_bias.flatten(),
        )

    def directional_forward(
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
        folded = fold(u, delta, A, B, C, D, delta_bias, order)
        out, _, states = forward(*folded, delta_softplus, save_states)
        directions = order.shape[0]
        y = put_tokens(torch.unflatten(out, 1, (directions, -1)), order)  # (B, K, D, L)
        if save_states:
            # (B, chunk, N, K, D) -> (B, K, chunk, N, D)
            shape = (u.shape[0], n_chunks(u.shape[2]), A.shape[2], directions, u.shape[1])
            states = states.view(shape).permute(0, 3, 1, 2, 4).flatten()
        return torch.empty_like(u).copy_(y.sum(1, dtype=compute_dtype(u))), states

    def directional_backward(
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
    ) -> tuple[Tensor | None, ...]:
        directions = order.shape[0]
        folded = fold(u, delta, A, B, C, D, delta_bias, order)
        # (B, K, chunk, N, D) -> (B, chunk, N, K, D)
        shape = (u.shape[0], directions, n_chunks(u.shape[2]), A.shape[2], u.shape[1])
        states = states.view(shape).permute(0, 2, 3, 1, 4).flatten()
        grad_out = take_tokens(grad_y, order).flatten(1, 2)
        gradients = backward(grad_out, None, *folded, delta_softplus, states)
        du, ddelta, dA, dB, dC, dD, _, ddelta_bias = gradients
        assert du is not None and ddelta is not None and dA is not None and dB is not None and dC is not None
        return (
            put_tokens(torch.unflatten(du, 1, (directions, -1)), order).sum(1, dtype=compute_dtype(u)).to(u.dtype),
            put_tokens(torch.unflatten(ddelta, 1, (directions, -1)), order),
            dA.view_as(A),
            put_tokens(dB, order),
            put_tokens(dC, order),
            None if D is None or dD is None else dD.view_as(D),
            None if delta_bias is None or ddelta_bias is None else ddelta_bias.view_as(delta_bias),
        )

    return directional_forward, directional_backward
