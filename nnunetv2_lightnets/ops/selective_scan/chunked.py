"""Backend "torch": the selective scan in torch's own operations, many chunks side by side. Runs on any device.

A sequence is cut into chunks of 64 tokens. A block of neighbouring chunks is scanned together: the recurrence takes
64 vectorised steps of all chunks at once, first with empty initial states, only to learn how each chunk ends, then,
after these ends have been carried from chunk to chunk, with the right initial states. So the values are those of the
textbook recurrence, made of the same products: only decays ``exp(delta * A)`` are multiplied, which lie in (0, 1],
and nothing is divided, so nothing overflows however large ``delta * A`` is.

Blocks follow each other, so the working memory is that of one block; beside it there are only the output and one state
for every chunk. The backward pass takes the blocks from the last to the first, starting each from its saved states.

Inside a block, tensors are (T, B, G, m, ...): T tokens of a chunk, G groups of channels, m chunks. The states'
innermost dimension is the channels of a group, so that steps (one for each channel and token) and inputs (one for each
state and token) both broadcast over long contiguous rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_lightnets.ops.selective_scan.layout import CHUNK, compute_dtype, directional_from_plain, n_chunks

NAME = "torch"

# States that one step of the recurrence updates at once: enough to hide the cost of calling an operation, few enough
# that 64 of such steps stay in a CPU's caches.
WIDTH = {"cpu": 16 * 1024}
WIDTH_ELSEWHERE = 1024 * 1024


def unavailable() -> str | None:
    """Torch's own operations run wherever torch does."""
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


class _Block(NamedTuple):
    """Tokens ``start`` to ``stop`` as ``chunks`` chunks of ``steps`` tokens, the last one padded."""

    start: int
    stop: int
    chunks: int
    steps: int

    @property
    def padding(self) -> int:
        return self.chunks * self.steps - (self.stop - self.start)

    def load(self, x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
        """``x`` (B, G * X, L) -> (T, B, G, m, X), padded by zeros."""
        x = x[:, :, self.start : self.stop]
        if self.padding:
            x = F.pad(x, (0, self.padding))
        x = x.unflatten(2, (self.chunks, self.steps)).unflatten(1, (groups, -1))  # (B, G, X, m, T)
        return x.permute(4, 0, 1, 3, 2).to(dtype, copy=True, memory_format=torch.contiguous_format)

    def store(self, x: Tensor, target: Tensor) -> None:
        """``x`` (T, B, G, m, X) into ``target`` (B, G * X, L)."""
        target = target[:, :, self.start : self.stop].unflatten(1, (x.shape[2], -1))
        x = x.permute(1, 2, 4, 3, 0)  # (B, G, X, m, T)
        if self.padding:
            target.copy_(x.flatten(3)[..., : self.stop - self.start])
        else:
            target.unflatten(3, (self.chunks, self.steps)).copy_(x)

    def clear_padding(self, x: Tensor) -> None:
        """Zero the padded tokens of ``x`` (T, B, G, m, X), which all belong to the last chunk."""
        if self.padding:
            x[self.steps - self.padding :, :, :, -1] = 0


def _blocks(u: Tensor, state: int) -> Iterator[_Block]:
    batch, channels, length = u.shape
    width = WIDTH.get(u.device.type, WIDTH_ELSEWHERE)
    together = max(1, width // (batch * channels * state)) * CHUNK
    for start in range(0, length, together):
        stop = min(start + together, length)
        yield _Block(start, stop, n_chunks(stop - start), min(CHUNK, stop - start))


class _Parameters(NamedTuple):
    """The arguments that belong to channels, grouped, in the compute dtype."""

    A: Tensor  # (G, 1, N, X)
    D: Tensor | None  # (G, 1, X)
    delta_bias: Tensor | None  # (G, 1, X)


def _parameters(A: Tensor, D: Tensor | None, delta_bias: Tensor | None, groups: int) -> _Parameters:
    return _Parameters(
        A.unflatten(0, (groups, -1)).transpose(1, 2).unsqueeze(1).contiguous(),
        None if D is None else D.unflatten(0, (groups, 1, -1)),
        None if delta_bias is None else delta_bias.unflatten(0, (groups, 1, -1)),
    )


def _steps(block: _Block, delta: Tensor, parameters: _Parameters, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """Step sizes (T, B, G, m, X) before and after softplus; padded tokens take no step and so keep the state."""
    raw = block.load(delta, parameters.A.shape[0], parameters.A.dtype)
    if parameters.delta_bias is not None:
        raw += parameters.delta_bias
    step = F.softplus(raw) if delta_softplus else raw
    block.clear_padding(step)
    return raw, step


def _total_decay(step: Tensor, A: Tensor) -> Tensor:
    """By what each chunk as a whole multiplies its initial state: (B, G, m, N, X)."""
    return torch.exp(step.sum(0).unsqueeze(-2) * A)


def _scan(decays: Sequence[Tensor], states: Sequence[Tensor], initial: Tensor) -> None:
    """states[t] += decays[t] * states[t - 1] in place, with states[-1] = ``initial``."""
    for decay, state in zip(decays, states, strict=True):
        torch.addcmul(state, decay, initial, out=state)
        initial = state


def _scan_end(decays: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """The last state of a scan that starts with ``inputs[0]``, storing none of the others; one decay less."""
    state = inputs[0].clone()
    for decay, x in zip(decays, inputs[1:], strict=True):
        torch.addcmul(x, decay, state, out=state)
    return state


def _carry(ends: Tensor, total: Tensor, carried: Tensor, chunks: Sequence[int]) -> Tensor:
    """What enters every chunk, (B, G, m, N, X), as ``carried`` (B, G, N, X) enters the first of ``chunks``.

    Args:
        ends: What leaves each chunk when nothing enters it, (B, G, m, N, X).
        total: Product of each chunk's decays, (B, G, m, N, X).
        carried: (B, G, N, X).
        chunks: The chunks in the order in which they pass on what they carry.
    """
    entering = torch.empty_like(ends)
    for chunk in chunks:
        entering[:, :, chunk] = carried
        carried = torch.addcmul(ends[:, :, chunk], total[:, :, chunk], carried)
    return entering


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
    batch, channels, length = u.shape
    groups, state = B.shape[1:3]
    parameters = _parameters(A, D, delta_bias, groups)
    B, C = B.flatten(1, 2), C.flatten(1, 2)
    out = torch.empty_like(u)
    saved = A.new_empty(batch, n_chunks(length), state, channels) if save_states else A.new_empty(0)
    h = A.new_zeros(batch, groups, state, channels // groups)
    for block in _blocks(u, state):
        _, step = _steps(block, delta, parameters, delta_softplus)
        x = block.load(u, groups, dtype)
        decay = torch.exp_(step.unsqueeze(-2) * parameters.A)  # (T, B, G, m, N, X)
        states = (step * x).unsqueeze(-2) * block.load(B, groups, dtype).unsqueeze(-1)
        decays, history = decay.unbind(), states.unbind()
        initial = h.unsqueeze(2)  # (B, G, m, N, X)
        if block.chunks > 1:
            initial = _carry(_scan_end(decays[1:], history), _total_decay(step, parameters.A), h, range(block.chunks))
        _scan(decays, history, initial)
        h = states[-1, :, :, -1].clone()
        y = (block.load(C, groups, dtype).unsqueeze(-2) @ states).squeeze(-2)  # (T, B, G, m, X)
        if parameters.D is not None:
            y += parameters.D * x
        if z is not None:
            y *= F.silu(block.load(z, groups, dtype))
        block.store(y, out)
        if save_states:
            first = block.start // CHUNK
            target = saved[:, first : first + block.chunks].unflatten(3, (groups, -1))  # (B, m, N, G, X)
            target.copy_(initial.permute(0, 2, 3, 1, 4))
    return out, h.transpose(2, 3).reshape(batch, channels, state), saved.flatten()


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
    """Gradients of u, delta, A, B, C, D, z and delta_bias; the states inside a block are computed again."""
    dtype = compute_dtype(u)
    batch, channels, length = u.shape
    groups, state = B.shape[1:3]
    parameters = _parameters(A, D, delta_bias, groups)
    flat_B, flat_C = B.flatten(1, 2), C.flatten(1, 2)
    # (B, G, chunk, N, X)
    saved = states.view(batch, n_chunks(length), state, groups, -1).permute(0, 3, 1, 2, 4)

    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dB, dC = torch.empty_like(flat_B), torch.empty_like(flat_C)
    dz = None if z is None else torch.empty_like(z)
    dA = torch.zeros_like(parameters.A)
    dD = None if parameters.D is None else torch.zeros_like(parameters.D)
    dbias = None if parameters.delta_bias is None else torch.zeros_like(parameters.delta_bias)
    if grad_last_state is None:
        carried = A.new_zeros(batch, groups, state, channels // groups)
    else:
        carried = grad_last_state.to(dtype).unflatten(1, (groups, -1)).transpose(2, 3).contiguous()

    for block in reversed(list(_blocks(u, state))):
        raw, step = _steps(block, delta, parameters, delta_softplus)
        x, grad = block.load(u, groups, dtype), block.load(grad_out, groups, dtype)
        B_block, C_block = block.load(flat_B, groups, dtype), block.load(flat_C, groups, dtype)
        decay = torch.exp_(step.unsqueeze(-2) * parameters.A)  # (T, B, G, m, N, X)
        first = block.start // CHUNK
        initial = saved[:, :, first : first + block.chunks].contiguous()  # (B, G, m, N, X)
        h = (step * x).unsqueeze(-2) * B_block.unsqueeze(-1)
        decays = decay.unbind()
        _scan(decays, h.unbind(), initial)

        if z is not None and dz is not None:
            y = (C_block.unsqueeze(-2) @ h).squeeze(-2)
            if parameters.D is not None:
                y += parameters.D * x
            gate = block.load(z, groups, dtype)
            sigmoid = torch.sigmoid(gate)
            block.store(grad * y * sigmoid * (1 + gate * (1 - sigmoid)), dz)
            grad *= gate * sigmoid
        block.store((h @ grad.unsqueeze(-1)).squeeze(-1), dC)

        # The same recurrence backwards: dh[t] = C[t] grad[t] + decay[t + 1] dh[t + 1].
        dh = grad.unsqueeze(-2) * C_block.unsqueeze(-1)
        last_to_first, later_decays = dh.unbind()[::-1], decays[:0:-1]
        entering = carried.unsqueeze(2)  # (B, G, m, N, X)
        if block.chunks > 1:
            leaving = decay[0] * _scan_end(later_decays, last_to_first)
            total = _total_decay(step, parameters.A)
            entering = _carry(leaving, total, carried, range(block.chunks)[::-1])
        dh[-1] += entering
        _scan(later_decays, last_to_first[1:], dh[-1])
        carried = decay[0, :, :, 0] * dh[0, :, :, 0]

        block.store((dh @ (step * x).unsqueeze(-1)).squeeze(-1), dB)
        dinput = (B_block.unsqueeze(-2) @ dh).squeeze(-2)  # gradient of step * x
        dh *= decay
        dh[0] *= initial
        dh[1:] *= h[:-1]  # now the gradient of the exponent step * A
        dstep = dinput * x + (dh * parameters.A).sum(-2)
        dA += (dh * step.unsqueeze(-2)).sum((0, 1, 3)).unsqueeze(1)

        dx = dinput * step
        if parameters.D is not None and dD is not None:
            dx += grad * parameters.D
            dD += (grad * x).sum((0, 1, 3)).unsqueeze(1)
        block.store(dx, du)
        if delta_softplus:
            dstep *= torch.where(raw > 20, 1.0, torch.sigmoid(raw))  # torch's softplus is linear above 20
        block.clear_padding(dstep)
        if dbias is not None:
            dbias += dstep.sum((0, 1, 3)).unsqueeze(1)
        block.store(dstep, ddelta)

    return (
        du,
        ddelta,
        dA.squeeze(1).transpose(1, 2).reshape(channels, state),
        dB.view_as(B),
        dC.view_as(C),
        None if dD is None else dD.flatten(),
        dz,
        None if dbias is None else dbias.flatten(),
    )


directional_forward, directional_backward = directional_from_plain(forward, backward)
