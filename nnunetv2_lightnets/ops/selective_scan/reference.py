"""Backend "reference": the selective scan as the textbook writes it, one token after the other.

It defines what every other backend computes and serves the tests. It takes any strides and any floating dtype (half
precision is computed in float32), computes all states again in its backward pass and keeps them there, and is slow.

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752, equations
(2a), (2b) and Algorithm 2, with A discretised by zero-order hold and B by Euler's rule, as in mamba-ssm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_lightnets.ops.selective_scan.record import CHUNK, Gradients, Scan
from nnunetv2_lightnets.ops.tensors import in_layout_of

NAME = "reference"


def unavailable() -> str | None:
    """The textbook loop runs wherever torch does."""
    return None


def refuses(scan: Scan) -> str | None:
    """Takes every call."""
    return None


def _tokens(x: Tensor, scan: Scan) -> Tensor:
    """``x`` (B, K or 1, ..., L) in each direction's order and in the compute dtype, tokens first: (L, B, K, ...)."""
    x = x.to(scan.dtype)
    if scan.order is not None:
        index = scan.order.long().view(1, scan.directions, *[1] * (x.dim() - 3), -1)
        x = x.take_along_dim(index, -1)
    return x.movedim(-1, 0).contiguous()


def _in_image_order(x: Tensor, scan: Scan) -> Tensor:
    """The inverse of :func:`_tokens`: (L, B, K, ...) to (B, K, ..., L)."""
    x = x.movedim(0, -1)
    if scan.order is None:
        return x
    index = scan.order.long().argsort(-1).view(1, scan.directions, *[1] * (x.dim() - 3), -1)
    return x.take_along_dim(index, -1)


def _per_channel(x: Tensor, scan: Scan) -> Tensor:
    """B or C (B, G or K, N, L) as (L, B, K, D, N): a group of neighbouring channels shares one."""
    rows = _tokens(torch.unflatten(x, 1, (scan.directions, -1)), scan)  # (L, B, K, G, N)
    return rows.repeat_interleave(scan.u.shape[1] // rows.shape[3], 3)


def forward(scan: Scan, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, D, L), last state (B, [K,] D, N) and the states before every chunk, (B, K, chunk, N, D) flat."""
    s = scan.with_directions()
    u, B, C = _tokens(s.u[:, None], s), _per_channel(s.B, s), _per_channel(s.C, s)
    _, step = _step_sizes(s)
    h = s.A.new_zeros(s.state_shape) if s.initial_state is None else s.initial_state  # (B, K, D, N)
    y, starts = torch.empty_like(step), []
    for t in range(len(step)):
        if save_states and t % CHUNK == 0:
            starts.append(h.mT)
        h = torch.exp(step[t, ..., None] * s.A) * h + (step[t] * u[t])[..., None] * B[t]
        y[t] = (h * C[t]).sum(-1)
    if s.D is not None:
        y = y + s.D * u
    out = _in_image_order(y, s).sum(1)
    if s.z is not None:
        out = out * F.silu(s.z.to(s.dtype))
    states = torch.stack(starts, dim=2).flatten() if starts else h.new_empty(0)
    return in_layout_of(scan.u, out), h.view(scan.state_shape), states


def _step_sizes(s: Scan) -> tuple[Tensor, Tensor]:
    """Step sizes (L, B, K, D) before and after softplus."""
    raw = _tokens(s.delta, s)
    if s.delta_bias is not None:
        raw = raw + s.delta_bias
    return raw, F.softplus(raw) if s.delta_softplus else raw


def backward(scan: Scan, grads: tuple[Tensor, Tensor | None], states: Tensor) -> Gradients:
    """Gradients of the scan's tensors, by the chain rule from the last token to the first."""
    s, (grad_out, grad_last_state) = scan.with_directions(), grads
    u, B, C = _tokens(s.u[:, None], s), _per_channel(s.B, s), _per_channel(s.C, s)
    raw, step = _step_sizes(s)
    h = [s.A.new_zeros(s.state_shape) if s.initial_state is None else s.initial_state]  # h[t] is before token t
    for t in range(len(step)):
        h.append(torch.exp(step[t, ..., None] * s.A) * h[t] + (step[t] * u[t])[..., None] * B[t])

    dy, dz = _tokens(grad_out[:, None].expand(-1, s.directions, -1, -1), s), None
    if s.z is not None:
        y = torch.stack([(h[t + 1] * C[t]).sum(-1) for t in range(len(step))])
        y = y if s.D is None else y + s.D * u
        gate = _tokens(s.z[:, None], s)
        sigmoid = torch.sigmoid(gate)
        dz = (dy * y * sigmoid * (1 + gate * (1 - sigmoid))).movedim(0, -1)[:, 0]
        dy = dy * gate * sigmoid

    dh = torch.zeros_like(h[0]) if grad_last_state is None else grad_last_state.reshape(s.state_shape)
    du, dstep, dB, dC = (torch.empty_like(x) for x in (step, step, B, C))
    dA = torch.zeros_like(s.A)
    for t in reversed(range(len(step))):
        dh = dh + dy[t, ..., None] * C[t]
        dC[t] = dy[t, ..., None] * h[t + 1]
        dB[t] = dh * (step[t] * u[t])[..., None]
        dinput = (dh * B[t]).sum(-1)  # of step * u
        dh = dh * torch.exp(step[t, ..., None] * s.A)  # of h[t], without what token t - 1 adds to it
        dexponent = dh * h[t]  # of step * A
        dA += (dexponent * step[t, ..., None]).sum(0)
        dstep[t] = (dexponent * s.A).sum(-1) + dinput * u[t]
        du[t] = dinput * step[t]

    dD = None if s.D is None else (dy * u).sum((0, 1))
    if s.D is not None:
        du = du + dy * s.D
    if s.delta_softplus:
        dstep = dstep * torch.where(raw > 20, 1.0, torch.sigmoid(raw))  # torch's softplus is linear above 20
    groups = s.B.shape[1] // s.directions
    return scan.gradients(
        _in_image_order(du, s).sum(1),
        _in_image_order(dstep, s),
        dA,
        *(_in_image_order(torch.unflatten(x, 3, (groups, -1)).sum(4), s).flatten(1, 2) for x in (dB, dC)),
        dD,
        dz,
        None if s.delta_bias is None else dstep.sum((0, 1)),
        None if s.initial_state is None else dh,
    )
