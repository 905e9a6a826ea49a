"""Backend "reference": the selective scan as the textbook writes it, one token after the other.

It defines what every other backend computes and serves the tests. It keeps all states in its backward pass,
takes any strides and any floating dtype (half precision is computed in float32), and is slow.

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752, equations
(2a), (2b) and Algorithm 2, with A discretised by zero-order hold and B by Euler's rule, as in mamba-ssm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_lightnets.ops.selective_scan.layout import CHUNK, compute_dtype, directional_from_plain

NAME = "reference"


def unavailable() -> str | None:
    """The textbook loop runs wherever torch does."""
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
    """Takes every call."""
    return None


def _step_sizes(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """``delta`` (B, D, L) before and after softplus, in the compute dtype."""
    raw = delta.to(compute_dtype(delta))
    if delta_bias is not None:
        raw = raw + delta_bias[:, None]
    return raw, F.softplus(raw) if delta_softplus else raw


def _per_channel(x: Tensor, channels: int) -> Tensor:
    """B or C (B, G, N, L) as (L, B, D, N): every group serves D / G neighbouring channels."""
    x = x.to(compute_dtype(x)).permute(3, 0, 1, 2).contiguous()  # (L, B, G, N)
    return x.repeat_interleave(channels // x.shape[2], dim=2)


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
    """Output (B, D, L), last state (B, D, N) and the states at the start of every chunk (flat)."""
    dtype = compute_dtype(u)
    _, step = _step_sizes(delta, delta_bias, delta_softplus)
    x = u.to(dtype)
    h = x.new_zeros(*u.shape[:2], A.shape[1])  # (B, D, N)
    y = torch.empty_like(x)
    starts = []
    B_per_channel, C_per_channel = _per_channel(B, u.shape[1]), _per_channel(C, u.shape[1])
    for t in range(u.shape[2]):
        if save_states and t % CHUNK == 0:
            starts.append(h.transpose(1, 2))  # (B, N, D)
        step_t = step[:, :, t, None]
        h = torch.exp(step_t * A) * h + step_t * x[:, :, t, None] * B_per_channel[t]
        y[:, :, t] = (h * C_per_channel[t]).sum(-1)
    if D is not None:
        y = y + D[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    states = torch.stack(starts, dim=1).flatten() if starts else x.new_empty(0)
    return torch.empty_like(u).copy_(y), h, states


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
    """Gradients of u, delta, A, B, C, D, z and delta_bias, by the chain rule from the last token to the first."""
    dtype = compute_dtype(u)
    batch, channels, length = u.shape
    raw, step = _step_sizes(delta, delta_bias, delta_softplus)
    x, grad = u.to(dtype), grad_out.to(dtype)
    B_per_channel, C_per_channel = _per_channel(B, channels), _per_channel(C, channels)

    h = x.new_zeros(batch, channels, A.shape[1])
    history = [h]  # history[t] is the state before token t
    for t in range(length):
        step_t = step[:, :, t, None]
        h = torch.exp(step_t * A) * h + step_t * x[:, :, t, None] * B_per_channel[t]
        history.append(h)

    grad_z = None
    if z is not None:
        y = torch.stack([(history[t + 1] * C_per_channel[t]).sum(-1) for t in range(length)], dim=-1)
        if D is not None:
            y = y + D[:, None] * x
        gate = z.to(dtype)
        sigmoid = torch.sigmoid(gate)
        grad_z = (grad * y * sigmoid * (1 + gate * (1 - sigmoid))).to(z.dtype)
        grad = grad * gate * sigmoid

    grad_x, grad_step = torch.zeros_like(x), torch.zeros_like(x)
    grad_A = torch.zeros_like(A)
    grad_B, grad_C = torch.zeros_like(B_per_channel), torch.zeros_like(C_per_channel)  # (L, B, D, N)
    grad_h = torch.zeros_like(h) if grad_last_state is None else grad_last_state.to(dtype)
    for t in reversed(range(length)):
        step_t, x_t, grad_y = step[:, :, t, None], x[:, :, t, None], grad[:, :, t, None]
        decay = torch.exp(step_t * A)
        grad_h = grad_h + grad_y * C_per_channel[t]
        grad_C[t] = grad_y * history[t + 1]
        grad_B[t] = grad_h * step_t * x_t
        grad_input = (grad_h * B_per_channel[t]).sum(-1)  # of step * x
        grad_exponent = grad_h * decay * history[t]  # of step * A
        grad_A += (grad_exponent * step_t).sum(0)
        grad_step[:, :, t] = grad_input * x[:, :, t] + (grad_exponent * A).sum(-1)
        grad_x[:, :, t] = grad_input * step[:, :, t]
        grad_h = grad_h * decay

    grad_D = None
    if D is not None:
        grad_D = (grad * x).sum((0, 2))
        grad_x = grad_x + grad * D[:, None]
    if delta_softplus:
        grad_step = grad_step * torch.where(raw > 20, 1.0, torch.sigmoid(raw))  # torch's softplus is linear above 20

    def per_group(per_channel: Tensor, like: Tensor) -> Tensor:
        grouped = torch.unflatten(per_channel, 2, (like.shape[1], -1)).sum(3)  # (L, B, G, N)
        return grouped.permute(1, 2, 3, 0).to(like.dtype)

    return (
        grad_x.to(u.dtype),
        grad_step.to(delta.dtype),
        grad_A,
        per_group(grad_B, B),
        per_group(grad_C, C),
        grad_D,
        grad_z,
        None if delta_bias is None else grad_step.sum((0, 2)),
    )


directional_forward, directional_backward = directional_from_plain(forward, backward)
