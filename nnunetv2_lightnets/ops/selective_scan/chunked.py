"""Backend "torch": the selective scan in torch's own operations, many chunks side by side. Runs on any device.

A sequence is cut into chunks of 64 tokens. A block of neighbouring chunks is scanned together: the recurrence takes
64 vectorised steps of all chunks at once, first with empty initial states, only to learn how each chunk ends, then,
after these ends have been carried from chunk to chunk, with the right initial states. So the values are those of the
textbook recurrence, made of the same products: only decays ``exp(delta * A)`` are multiplied, which lie in (0, 1] in
a stable scan, and nothing is divided, so nothing overflows however large ``-delta * A`` is.

Blocks follow each other, so the working memory is that of one block (decays and states of its tokens, computed once
for both passes); beside it there are only the output and one state for every chunk. The backward pass takes the blocks
from the last to the first, and computes their states again from the saved ones.

Inside a block, tensors are (T, B, G, m, ...): T tokens of a chunk, G groups of channels, m chunks. The states'
innermost dimension is the X = D / G channels of a group, so that step sizes (one for each token and channel) and
inputs (one for each token and state) both broadcast over long contiguous rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_lightnets.ops.selective_scan import reference
from nnunetv2_lightnets.ops.selective_scan.gather import with_orders, with_orders_backward
from nnunetv2_lightnets.ops.selective_scan.record import CHUNK, Gradients, Scan, n_chunks, saved_states

NAME = "torch"

# States that one step of the recurrence updates at once: enough to hide what calling an operation costs, few enough
# that the 64 steps of a block stay in a CPU's caches.
WIDTH = {"cpu": 16 * 1024}
WIDTH_ELSEWHERE = 256 * 1024

# Torch computes exp2 on CPUs in half the time of exp.
LOG2_E = math.log2(math.e)


# It runs wherever torch does and takes every call, as the reference.
unavailable, refuses = reference.unavailable, reference.refuses


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
        x = x.view(x.shape[0], groups, -1, self.chunks, self.steps)  # (B, G, X, m, T)
        return x.permute(4, 0, 1, 3, 2).to(dtype, copy=True, memory_format=torch.contiguous_format)

    def store(self, x: Tensor, target: Tensor) -> None:
        """``x`` (T, B, G, m, X) into ``target`` (B, G * X, L)."""
        target = target[:, :, self.start : self.stop]
        x = x.permute(1, 2, 4, 3, 0)  # (B, G, X, m, T)
        if self.padding:
            target.copy_(x.reshape(*target.shape[:2], -1)[..., : self.stop - self.start])
        else:
            target.view(x.shape).copy_(x)

    def clear_padding(self, x: Tensor) -> None:
        """Zero the padded tokens of ``x`` (T, B, G, m, X), which all belong to the last chunk."""
        if self.padding:
            x[self.steps - self.padding :, :, :, -1] = 0


def _blocks(u: Tensor, state: int) -> list[_Block]:
    batch, channels, length = u.shape
    together = WIDTH.get(u.device.type, WIDTH_ELSEWHERE) // (batch * channels * state)
    if together < 4:
        together = 1  # and no first pass: what it costs is more than what longer rows save
    tokens = min(together * CHUNK, n_chunks(length) * CHUNK)
    blocks = []
    for start in range(0, length, tokens):
        stop = min(start + tokens, length)
        blocks.append(_Block(start, stop, n_chunks(stop - start), min(CHUNK, stop - start)))
    return blocks


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Channels (D, ...) as (G, 1, X, ...): the 1 is for the chunks of a block."""
    return x.view(groups, 1, -1, *x.shape[1:])


def _steps(block: _Block, scan: Scan, groups: int) -> tuple[Tensor, Tensor]:
    """Step sizes (T, B, G, m, X) before and after softplus; padded tokens take no step and so keep the state."""
    raw = block.load(scan.delta, groups, scan.dtype)
    if scan.delta_bias is not None:
        raw += _grouped(scan.delta_bias, groups)
    step = F.softplus(raw) if scan.delta_softplus else raw
    block.clear_padding(step)
    return raw, step


class _Room:
    """Memory for the states of a block, which all blocks use in turn."""

    def __init__(self, largest: _Block, like: Tensor) -> None:
        """``like`` (B, G, N, X) is the state after one token."""
        self._buffer = like.new_empty(largest.steps * largest.chunks, *like.shape)
        self._views: dict[tuple[int, int], tuple[Tensor, tuple[Tensor, ...]]] = {}

    def of(self, block: _Block) -> tuple[Tensor, tuple[Tensor, ...]]:
        """States (T, B, G, m, N, X), and the same token by token, as taking them apart for each block is slow."""
        size = block.steps, block.chunks
        if size not in self._views:
            _, batch, groups, state, channels = self._buffer.shape
            shape = (block.steps, batch, groups, block.chunks, state, channels)
            states = self._buffer[: block.steps * block.chunks].view(shape)
            self._views[size] = states, states.unbind()
        return self._views[size]


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
    end_of, total_of, entering_of = ends.unbind(2), total.unbind(2), entering.unbind(2)
    entering_of[chunks[0]].copy_(carried)
    for chunk, following in pairwise(chunks):
        torch.addcmul(end_of[chunk], total_of[chunk], entering_of[chunk], out=entering_of[following])
    return entering


@with_orders
def forward(scan: Scan, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, D, L), last state (B, [K,] D, N) and the states before every chunk, (B, K, chunk, N, D) flat."""
    u, _, A, B, C, D, z, _, initial_state = scan.tensors()
    dtype = scan.dtype
    batch, channels, length = u.shape
    groups, state = B.shape[1:3]
    A2 = _grouped(A * LOG2_E, groups).transpose(2, 3).contiguous()  # (G, 1, N, X)
    B, C = B.flatten(1, 2), C.flatten(1, 2)
    blocks = _blocks(u, state)
    carried = _carried_in(initial_state, A, batch, groups)
    decay_room, h_room = _Room(blocks[0], carried), _Room(blocks[0], carried)
    out = torch.empty_like(u)
    saved = A.new_empty(batch, n_chunks(length), state, channels) if save_states else A.new_empty(0)
    for block in blocks:
        _, step = _steps(block, scan, groups)
        x = block.load(u, groups, dtype)
        (decay, decays), (h, states) = decay_room.of(block), h_room.of(block)
        torch.mul(step.unsqueeze(-2), A2, out=decay).exp2_()
        torch.mul((step * x).unsqueeze(-2), block.load(B, groups, dtype).unsqueeze(-1), out=h)
        initial = carried.unsqueeze(2)  # (B, G, m, N, X)
        if block.chunks > 1:
            total = torch.exp2(step.sum(0).unsqueeze(-2) * A2)
            initial = _carry(_scan_end(decays[1:], states), total, carried, range(block.chunks))
        _scan(decays, states, initial)
        carried = h[-1, :, :, -1].clone()  # (B, G, N, X)
        y = (block.load(C, groups, dtype).unsqueeze(-2) @ h).squeeze(-2)  # (T, B, G, m, X)
        if D is not None:
            y += _grouped(D, groups) * x
        if z is not None:
            y *= F.silu(block.load(z, groups, dtype))
        block.store(y, out)
        if save_states:
            first = block.start // CHUNK
            target = saved[:, first : first + block.chunks]  # (B, m, N, D)
            target.view(*target.shape[:3], groups, -1).copy_(initial.permute(0, 2, 3, 1, 4))
    return out, _carried_out(carried), saved.flatten()


@with_orders_backward
def backward(scan: Scan, grads: tuple[Tensor, Tensor | None], states: Tensor) -> Gradients:
    """Gradients of the scan's tensors; the states inside a block are computed again."""
    u, delta, A, B, C, D, z, _, initial_state = scan.tensors()
    grad_out, grad_last_state = grads
    dtype = scan.dtype
    batch, _, length = u.shape
    groups, state = B.shape[1:3]
    A_grouped = _grouped(A, groups).transpose(2, 3).contiguous()  # (G, 1, N, X)
    A2 = A_grouped * LOG2_E
    flat_B, flat_C = B.flatten(1, 2), C.flatten(1, 2)
    blocks = _blocks(u, state)
    # (B, chunk, N, D) -> (B, G, chunk, N, X)
    states = saved_states(scan, states, forward).view(batch, n_chunks(length), state, groups, -1)
    saved = states.permute(0, 3, 1, 2, 4)

    du, ddelta, dB, dC = (torch.empty_like(x) for x in (u, delta, flat_B, flat_C))
    dz = None if z is None else torch.empty_like(z)
    dA = torch.zeros_like(A_grouped)
    dD, dbias = torch.zeros_like(A[:, 0]), torch.zeros_like(A[:, 0])
    carried = _carried_in(grad_last_state, A, batch, groups)
    decay_room, h_room, dh_room = (_Room(blocks[0], carried) for _ in range(3))

    for block in reversed(blocks):
        raw, step = _steps(block, scan, groups)
        x, grad = block.load(u, groups, dtype), block.load(grad_out, groups, dtype)
        B_block, C_block = block.load(flat_B, groups, dtype), block.load(flat_C, groups, dtype)
        first = block.start // CHUNK
        initial = saved[:, :, first : first + block.chunks].contiguous()  # (B, G, m, N, X)
        (decay, decays), (h, states_of), (dh, dh_of) = (room.of(block) for room in (decay_room, h_room, dh_room))
        torch.mul(step.unsqueeze(-2), A2, out=decay).exp2_()
        torch.mul((step * x).unsqueeze(-2), B_block.unsqueeze(-1), out=h)
        _scan(decays, states_of, initial)

        if z is not None and dz is not None:
            y = (C_block.unsqueeze(-2) @ h).squeeze(-2)  # (T, B, G, m, X)
            if D is not None:
                y += _grouped(D, groups) * x
            gate = block.load(z, groups, dtype)
            sigmoid = torch.sigmoid(gate)
            block.store(grad * y * sigmoid * (1 + gate * (1 - sigmoid)), dz)
            grad *= gate * sigmoid
        block.store(_over_channels(h, grad), dC)

        # The same recurrence from the last token to the first: dh[t] = C[t] grad[t] + decay[t + 1] dh[t + 1].
        torch.mul(grad.unsqueeze(-2), C_block.unsqueeze(-1), out=dh)
        later_decays, backwards = decays[:0:-1], dh_of[::-1]
        entering = carried.unsqueeze(2)  # (B, G, m, N, X)
        if block.chunks > 1:
            total = torch.exp2(step.sum(0).unsqueeze(-2) * A2)
            leaving = _scan_end(later_decays, backwards).mul_(decay[0])
            entering = _carry(leaving, total, carried, range(block.chunks)[::-1])
        dh[-1] += entering
        _scan(later_decays, backwards[1:], dh[-1])
        carried = decay[0, :, :, 0] * dh[0, :, :, 0]  # (B, G, N, X)

        block.store(_over_channels(dh, step * x), dB)
        dinput = (B_block.unsqueeze(-2) @ dh).squeeze(-2)  # (T, B, G, m, X), gradient of step * x
        dh *= decay
        dh[0] *= initial
        dh[1:] *= h[:-1]  # now the gradient of the exponent, step * A
        dstep = torch.mul(dh, A_grouped, out=h).sum(-2).addcmul_(dinput, x)
        dA += dh.mul_(step.unsqueeze(-2)).sum((0, 1, 3)).unsqueeze(1)

        dx = dinput.mul_(step)
        if D is not None:
            dx += grad * _grouped(D, groups)
            dD += (grad * x).sum((0, 1, 3)).flatten()
        block.store(dx, du)
        if scan.delta_softplus:
            dstep *= torch.where(raw > 20, 1.0, torch.sigmoid(raw))  # torch's softplus is linear above 20
        block.clear_padding(dstep)
        dbias += dstep.sum((0, 1, 3)).flatten()
        block.store(dstep, ddelta)

    dinitial = None if initial_state is None else _carried_out(carried)
    return scan.gradients(du, ddelta, dA.transpose(2, 3), dB, dC, dD, dz, dbias, dinitial)


def _carried_in(given: Tensor | None, A: Tensor, batch: int, groups: int) -> Tensor:
    """What enters the sequence, (B, G, N, X): ``given`` (B, D, N), or zero."""
    channels, state = A.shape
    if given is None:
        return A.new_zeros(batch, groups, state, channels // groups)
    return given.reshape(batch, groups, -1, state).transpose(2, 3).contiguous()


def _carried_out(carried: Tensor) -> Tensor:
    """The inverse of :func:`_carried_in`."""
    batch, groups, state, channels = carried.shape
    return carried.transpose(2, 3).reshape(batch, groups * channels, state)


def _over_channels(h: Tensor, weight: Tensor) -> Tensor:
    """Sum of ``h`` (T, B, G, m, N, X) over channels by ``weight`` (T, B, G, m, X): (T, B, G, m, N)."""
    # Not h @ weight: matrix times vector is several times slower in MKL's batched products.
    return (weight.unsqueeze(-2) @ h.transpose(-1, -2)).squeeze(-2)
