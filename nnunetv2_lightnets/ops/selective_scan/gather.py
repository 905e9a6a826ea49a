"""Directional scans for backends that take tokens as they lie: gather, scan with a group per direction, put back."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from nnunetv2_lightnets.ops.selective_scan.record import Gradients, Scan, n_chunks
from nnunetv2_lightnets.ops.tensors import in_layout_of

Forward = Callable[[Scan, bool], tuple[Tensor, Tensor, Tensor]]
Backward = Callable[[Scan, tuple[Tensor, Tensor | None], Tensor], Gradients]


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


def _gathered(scan: Scan, order: Tensor) -> Scan:
    """The plain scan of (B, K * D, L) sequences with K groups, whose tokens are taken in ``order``."""
    return Scan(
        take_tokens(scan.u, order).flatten(1, 2),
        take_tokens(scan.delta, order).flatten(1, 2),
        scan.A.flatten(0, 1),
        take_tokens(scan.B, order),
        take_tokens(scan.C, order),
        None if scan.D is None else scan.D.flatten(),
        None,
        None if scan.delta_bias is None else scan.delta_bias.flatten(),
        None if scan.initial_state is None else scan.initial_state.flatten(1, 2),
        None,
        scan.delta_softplus,
    )


def _permuted(states: Tensor, scan: Scan, inner: tuple[int, ...], axes: tuple[int, ...]) -> Tensor:
    """Saved states with their dimensions, ``inner`` between the first and the last, in another order, flat again."""
    if states.numel() != scan.saved_numbers:  # none are saved
        return states
    return states.view(scan.u.shape[0], *inner, scan.u.shape[1]).permute(axes).flatten()


def with_orders(forward: Forward) -> Forward:
    """The forward pass of a backend that takes plain scans, made to take directional ones, too."""

    @wraps(forward)
    def run(scan: Scan, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
        if scan.order is None:
            return forward(scan, save_states)
        out, last_state, states = forward(_gathered(scan, scan.order), save_states)
        y = put_tokens(torch.unflatten(out, 1, (scan.directions, -1)), scan.order).sum(1, dtype=scan.dtype)
        # (B, chunk, N, K, D) to (B, K, chunk, N, D)
        inner = (n_chunks(scan.u.shape[2]), scan.A.shape[2], scan.directions)
        return (
            in_layout_of(scan.u, y),
            last_state.view(scan.state_shape),
            _permuted(states, scan, inner, (0, 3, 1, 2, 4)),
        )

    return run


def with_orders_backward(backward: Backward) -> Backward:
    """The same for a backward pass."""

    @wraps(backward)
    def run(scan: Scan, grads: tuple[Tensor, Tensor | None], states: Tensor) -> Gradients:
        if scan.order is None:
            return backward(scan, grads, states)
        plain, (grad_out, grad_last_state) = _gathered(scan, scan.order), grads
        inner = (scan.directions, n_chunks(scan.u.shape[2]), scan.A.shape[2])
        states = _permuted(states, scan, inner, (0, 2, 3, 1, 4))
        if grad_last_state is not None:
            grad_last_state = grad_last_state.flatten(1, 2)
        grad_out = take_tokens(grad_out, scan.order).flatten(1, 2)
        du, ddelta, dA, dB, dC, *others = backward(plain, (grad_out, grad_last_state), states)
        assert du is not None and ddelta is not None and dB is not None and dC is not None
        return scan.gradients(
            put_tokens(torch.unflatten(du, 1, (scan.directions, -1)), scan.order).sum(1, dtype=scan.dtype),
            put_tokens(torch.unflatten(ddelta, 1, (scan.directions, -1)), scan.order),
            dA,
            put_tokens(dB, scan.order),
            put_tokens(dC, scan.order),
            *others,
        )

    return run
