# mypy: ignore-errors
# (The functions below are written in Triton's language, which only looks like Python to a type checker.)
"""Triton kernels of the selective scan; ``triton_scan.py`` launches them and explains the passes.

Names used throughout:

* A *sequence* is one (image, direction) pair; the plain scan has one direction. A *segment* is a run of whole chunks of
  a sequence.
* A *program* is one warp. It walks one segment for one block of ``BLOCK_D`` channels of one group, with all ``N``
  states of each (padded to ``BLOCK_N``, a power of two). The states, an (N, BLOCK_D) tile ``h``, stay in its registers.
* Inputs per channel and token come as (BLOCK_D, tokens) tiles: whichever of the two axes is the contiguous one in
  memory, a warp moves whole sectors, and the loads of a tile are in flight together.
* ``A`` is (directions, N, channels): a thread then takes several channels of a state at once, in which layout Triton
  goes on. ``a`` is a program's part of it, (N, BLOCK_D), times log2(e), so that a decay is one exp2.
* B and C, and their gradients, lie in memory in the same way, so that one set of strides serves both.
* ``order`` (directions, L), where given, holds the position in memory of each token; ``None``: tokens lie in order.
* ``ACC`` is the compute dtype.
* A walk loads tokens ``AHEAD`` of those that it computes: one step, or none.

Padding needs no special cases: tokens past the end have a step size of 0 (decay 1, input 0), padded states and
channels have inputs and gradients of 0. Offsets and channels are 64-bit where they enter an address.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)  # tokens between two checkpoints
TILE = tl.constexpr(4)  # tokens per step of a walk; split_tokens and join_tokens are written for four
TILES = tl.constexpr(16)  # tiles in a chunk
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)

# Sizes that change from call to call and that no memory access is aligned by: one compilation serves all their values.
SIZES = ("directions", "length", "parts", "segments", "segment_tokens", "run", "runs")
# B and C are slices of a projection of any width. A thread reads few of their numbers, whether aligned or not.
UNALIGNED = ("b", "c", "bc_batch", "bc_row", "bc_l", "db", "dc")


@triton.jit
def split_tokens(tile):
    """Take a (rows, 4) tile apart into its four columns."""
    even, odd = tl.split(tl.reshape(tile, (tile.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def join_tokens(first, second, third, fourth):
    """Put four columns together into a (rows, 4) tile."""
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(pairs, (first.shape[0], 4))


@triton.jit
def softplus(x, TERMS: tl.constexpr):
    """log(1 + exp(x)), x itself beyond 20 as in torch, with full relative accuracy for very negative x.

    log(1 + e) = 2 artanh(e / (2 + e)) as a series, for e = exp(-abs(x)) <= 1: the hardware's logarithm is good to
    2**-22 absolutely, which would leave a step size of 0.001 with only three digits.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    s2 = s * s
    series = tl.zeros_like(s)
    for i in tl.static_range(TERMS):
        series = series * s2 + 1.0 / (2 * (TERMS - 1 - i) + 1)
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + 2.0 * s * series)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def offsets(order_row, t, length):
    """Offsets in memory (64-bit, in tokens) of the tokens t."""
    offset = t if order_row is None else tl.load(order_row + t, mask=t < length, other=0)
    return tl.cast(offset, tl.int64)


@triton.jit
def load_tile(rows, offset, stride_l, mask, ACC: tl.constexpr):
    """A (BLOCK_D, tokens) tile of u, delta, z or an output's gradient; 0 where the mask is not set."""
    return tl.load(rows[:, None] + (offset * stride_l)[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def store_tile(rows, offset, stride_l, tile, mask):
    """Write a (BLOCK_D, tokens) tile in the dtype of the memory."""
    tl.store(rows[:, None] + (offset * stride_l)[None, :], tile.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(rows, order_row, t, length, stride_l, n_mask, ACC: tl.constexpr):
    """B or C of token t, (N,); 0 past the end."""
    offset = offsets(order_row, t, length)
    return tl.load(rows + offset * stride_l, mask=n_mask & (t < length), other=0.0).to(ACC)


@triton.jit
def step_sizes(delta_tile, bias, SOFTPLUS: tl.constexpr, TERMS: tl.constexpr, mask):
    """Step sizes of a (BLOCK_D, tokens) tile before and after softplus; 0 where the mask is not set."""
    raw = delta_tile
    if bias is not None:
        raw += bias[:, None]
    dt = raw
    if SOFTPLUS:
        dt = softplus(raw, TERMS)
    return raw, tl.where(mask, dt, 0.0)


@triton.jit
def advance(h, a, dt, x, b):
    """One token: h[t] = exp(dt A) h[t - 1] + dt u B, for x = dt u and dt (BLOCK_D,), b (N,)."""
    return tl.exp2(a * dt[None, :]) * h + b[:, None] * x[None, :]


@triton.jit
def adjoint_step(carry, a, dt, dy, c):
    """One token backwards: the gradient of h[t - 1], given ``carry``, what later tokens pass back as that of h[t]."""
    return tl.exp2(a * dt[None, :]) * (carry + c[:, None] * dy[None, :])


@triton.jit
def load_step(
    x, delta, gate, v, w, x_l, delta_l, gate_l, bc_l, order_row, t0, length, d_mask, n_mask, ACC: tl.constexpr
):
    """What four tokens from t0 on need: offsets, mask, delta, x, the gate, and v and w, (N, 4).

    x, delta and gate are pointers to rows of channels, v and w to rows of states. In place of a gate or a w that is
    None stands x or v, which nobody uses then.
    """
    t = t0 + tl.arange(0, TILE)
    offset = offsets(order_row, t, length)
    mask = d_mask[:, None] & (t < length)[None, :]
    delta_tile = load_tile(delta, offset, delta_l, mask, ACC)
    x_tile = load_tile(x, offset, x_l, mask, ACC)
    gate_tile = x_tile if gate is None else load_tile(gate, offset, gate_l, mask, ACC)
    v_mask = n_mask[:, None] & (t < length)[None, :]
    v_tile = load_tile(v, offset, bc_l, v_mask, ACC)
    w_tile = v_tile if w is None else load_tile(w, offset, bc_l, v_mask, ACC)
    return offset, mask, delta_tile, x_tile, gate_tile, v_tile, w_tile


@triton.jit
def locate(
    directions, channels, channels_per_group, length, segment_tokens,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Which segment of which sequence, and which states and channels, a program works on.

    Channel blocks run fastest, so that programs that share B and C run at the same time.
    """
    program = tl.program_id(0)
    blocks_per_group = tl.cdiv(channels_per_group, BLOCK_D)
    blocks = channels // channels_per_group * blocks_per_group
    segments = tl.cdiv(length, segment_tokens)
    block = program % blocks
    segment = (program // blocks) % segments
    sequence = (program // (blocks * segments)).to(tl.int64)
    group = block // blocks_per_group
    in_group = (block % blocks_per_group) * BLOCK_D + tl.arange(0, BLOCK_D)
    d = (group * channels_per_group + in_group).to(tl.int64)
    d_mask = in_group < channels_per_group
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    n_mask = n < N
    nd = n[:, None] * channels + d[None, :]
    nd_mask = n_mask[:, None] & d_mask[None, :]
    row = sequence * segments + segment
    return (
        segment,
        row,
        sequence,
        sequence // directions,
        sequence % directions,
        group,
        d,
        d_mask,
        n,
        n_mask,
        nd,
        nd_mask,
    )


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def segment_ends_kernel(
    u, delta, A, b, bias, order,  # read
    ends, dt_sums,  # written
    u_batch, u_d, u_l, delta_batch, delta_k, delta_d, delta_l, bc_batch, bc_row, bc_n, bc_l,
    directions, channels, channels_per_group, length, segment_tokens,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
    SOFTPLUS: tl.constexpr, TERMS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Forward, pass 1: each segment's end state when it starts from zero, and the sum of its step sizes."""
    segment, row, _sequence, batch, k, group, d, d_mask, n, n_mask, nd, nd_mask = locate(
        directions, channels, channels_per_group, length, segment_tokens, N, BLOCK_N, BLOCK_D
    )
    a = tl.load(A + k * N * channels + nd, mask=nd_mask, other=0.0) * LOG2E
    order_row = None if order is None else order + k * length
    step_bias = None if bias is None else tl.load(bias + k * channels + d, mask=d_mask, other=0.0)
    u_rows = u + batch * u_batch + d * u_d
    delta_rows = delta + batch * delta_batch + k * delta_k + d * delta_d
    b_rows = b + batch * bc_batch + (k + group) * bc_row + n * bc_n

    h = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dt_sum = tl.zeros((BLOCK_D, TILE), ACC)
    first = segment * segment_tokens
    now = load_step(
        u_rows, delta_rows, None, b_rows, None, u_l, delta_l, 0, bc_l, order_row, first, length, d_mask, n_mask, ACC
    )
    for t0 in range(first, tl.minimum(first + segment_tokens, length), TILE):
        t1 = t0 + AHEAD
        step = load_step(
            u_rows, delta_rows, None, b_rows, None, u_l, delta_l, 0, bc_l, order_row, t1, length, d_mask, n_mask, ACC
        )
        if AHEAD == 0:
            now = step
        _offset, mask, delta_tile, u_tile, _gate, b_tile, _c_tile = now
        b0, b1, b2, b3 = split_tokens(b_tile)
        _raw, dt = step_sizes(delta_tile, step_bias, SOFTPLUS, TERMS, mask)
        dt_sum += dt
        dt0, dt1, dt2, dt3 = split_tokens(dt)
        x0, x1, x2, x3 = split_tokens(dt * u_tile)
        h = advance(h, a, dt0, x0, b0)
        h = advance(h, a, dt1, x1, b1)
        h = advance(h, a, dt2, x2, b2)
        h = advance(h, a, dt3, x3, b3)
        now = step

    tl.store(ends + row * N * channels + nd, h, mask=nd_mask)
    tl.store(dt_sums + row * channels + d, tl.sum(dt_sum, 1), mask=d_mask)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def forward_kernel(
    u, delta, A, b, c, skip, z, bias, order, starts,  # read
    out, states, last_state,  # written
    u_batch, u_d, u_l, delta_batch, delta_k, delta_d, delta_l, bc_batch, bc_row, bc_n, bc_l,
    z_batch, z_d, z_l, out_batch, out_k, out_d, out_l,
    directions, channels, channels_per_group, length, segment_tokens,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
    SOFTPLUS: tl.constexpr, TERMS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Forward, pass 3: outputs, checkpoints and last state of each segment from its start state."""
    segment, row, sequence, batch, k, group, d, d_mask, n, n_mask, nd, nd_mask = locate(
        directions, channels, channels_per_group, length, segment_tokens, N, BLOCK_N, BLOCK_D
    )
    a = tl.load(A + k * N * channels + nd, mask=nd_mask, other=0.0) * LOG2E
    order_row = None if order is None else order + k * length
    step_bias = None if bias is None else tl.load(bias + k * channels + d, mask=d_mask, other=0.0)
    skip_d = None if skip is None else tl.load(skip + k * channels + d, mask=d_mask, other=0.0)
    u_rows = u + batch * u_batch + d * u_d
    delta_rows = delta + batch * delta_batch + k * delta_k + d * delta_d
    b_rows = b + batch * bc_batch + (k + group) * bc_row + n * bc_n
    c_rows = c + batch * bc_batch + (k + group) * bc_row + n * bc_n
    z_rows = None if z is None else z + batch * z_batch + d * z_d
    out_rows = out + batch * out_batch + k * out_k + d * out_d

    if starts is None:
        h = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    else:
        h = tl.load(starts + row * N * channels + nd, mask=nd_mask, other=0.0)
    first = segment * segment_tokens
    end = tl.minimum(first + segment_tokens, length)
    now = load_step(
        u_rows, delta_rows, z_rows, b_rows, c_rows, u_l, delta_l, z_l, bc_l,
        order_row, first, length, d_mask, n_mask, ACC,
    )  # fmt: skip
    for t0 in range(first, end, TILE):
        t1 = t0 + AHEAD
        step = load_step(
            u_rows, delta_rows, z_rows, b_rows, c_rows, u_l, delta_l, z_l, bc_l,
            order_row, t1, length, d_mask, n_mask, ACC,
        )  # fmt: skip
        if AHEAD == 0:
            now = step
        offset, mask, delta_tile, u_tile, gate, b_tile, c_tile = now
        b0, b1, b2, b3 = split_tokens(b_tile)
        c0, c1, c2, c3 = split_tokens(c_tile)
        if states is not None and t0 // CHUNK * CHUNK == t0:
            chunk = sequence * tl.cdiv(length, CHUNK) + t0 // CHUNK
            tl.store(states + chunk * N * channels + nd, h, mask=nd_mask)
        _raw, dt = step_sizes(delta_tile, step_bias, SOFTPLUS, TERMS, mask)
        dt0, dt1, dt2, dt3 = split_tokens(dt)
        x0, x1, x2, x3 = split_tokens(dt * u_tile)
        h = advance(h, a, dt0, x0, b0)
        y0 = tl.sum(h * c0[:, None], 0)
        h = advance(h, a, dt1, x1, b1)
        y1 = tl.sum(h * c1[:, None], 0)
        h = advance(h, a, dt2, x2, b2)
        y2 = tl.sum(h * c2[:, None], 0)
        h = advance(h, a, dt3, x3, b3)
        y3 = tl.sum(h * c3[:, None], 0)
        y = join_tokens(y0, y1, y2, y3)
        if skip is not None:
            y += skip_d[:, None] * u_tile
        if z is not None:
            y *= gate * sigmoid(gate)
        store_tile(out_rows, offset, out_l, y, mask)
        now = step

    if last_state is not None and end == length:
        last = last_state + (sequence * channels + d[None, :]) * N + n[:, None]
        tl.store(last, h, mask=nd_mask)


@triton.jit(do_not_specialize=SIZES)
def carry_kernel(
    ends, dt_sums, A, first_states,  # read
    starts, run_ends, run_dt_sums,  # written
    directions, channels, segments, run, runs, REVERSE: tl.constexpr,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Pass 2: the state with which each segment starts, from all segments' end states and step size sums.

    A program walks one run of ``run`` consecutive segments, from the last to the first where ``REVERSE`` (the adjoint
    state flows that way). It writes the start states, or, where ``run_ends`` is given, the run's own end state and
    step size sum: many segments are first reduced to runs, which are scanned the same way.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_D)
    d = ((program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    d_mask = d < channels
    this_run = (program // blocks) % runs
    sequence = (program // (blocks * runs)).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    n_mask = n < N
    nd = n[:, None] * channels + d[None, :]
    nd_mask = n_mask[:, None] & d_mask[None, :]
    a = tl.load(A + (sequence % directions) * N * channels + nd, mask=nd_mask, other=0.0) * LOG2E
    if first_states is None:
        h = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    else:
        h = tl.load(first_states + (sequence * runs + this_run) * N * channels + nd, mask=nd_mask, other=0.0)
    dt_sum = tl.zeros((BLOCK_D,), ACC)
    first = this_run * run
    count = tl.minimum(run, segments - first)
    for i in range(count):
        segment = first + count - 1 - i if REVERSE else first + i
        row = sequence * segments + segment
        dt = tl.load(dt_sums + row * channels + d, mask=d_mask, other=0.0)
        if starts is not None:
            tl.store(starts + row * N * channels + nd, h, mask=nd_mask)
        h = tl.exp2(a * dt[None, :]) * h + tl.load(ends + row * N * channels + nd, mask=nd_mask, other=0.0)
        dt_sum += dt
    if run_ends is not None:
        row = sequence * runs + this_run
        tl.store(run_ends + row * N * channels + nd, h, mask=nd_mask)
        tl.store(run_dt_sums + row * channels + d, dt_sum, mask=d_mask)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def adjoint_ends_kernel(
    grad, delta, A, c, z, bias, order,  # read
    ends, dt_sums,  # written
    grad_batch, grad_d, grad_l, delta_batch, delta_k, delta_d, delta_l, bc_batch, bc_row, bc_n, bc_l, z_batch, z_d, z_l,
    directions, channels, channels_per_group, length, segment_tokens,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
    SOFTPLUS: tl.constexpr, TERMS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Backward, pass 1: the adjoint state that each segment hands to the one before it when it receives zero."""
    segment, row, _sequence, batch, k, group, d, d_mask, n, n_mask, nd, nd_mask = locate(
        directions, channels, channels_per_group, length, segment_tokens, N, BLOCK_N, BLOCK_D
    )
    a = tl.load(A + k * N * channels + nd, mask=nd_mask, other=0.0) * LOG2E
    order_row = None if order is None else order + k * length
    step_bias = None if bias is None else tl.load(bias + k * channels + d, mask=d_mask, other=0.0)
    grad_rows = grad + batch * grad_batch + d * grad_d
    delta_rows = delta + batch * delta_batch + k * delta_k + d * delta_d
    c_rows = c + batch * bc_batch + (k + group) * bc_row + n * bc_n
    z_rows = None if z is None else z + batch * z_batch + d * z_d

    carry = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dt_sum = tl.zeros((BLOCK_D, TILE), ACC)
    first = segment * segment_tokens
    tiles = tl.cdiv(tl.minimum(segment_tokens, length - first), TILE)
    last = first + (tiles - 1) * TILE
    now = load_step(
        grad_rows, delta_rows, z_rows, c_rows, None, grad_l, delta_l, z_l, bc_l,
        order_row, last, length, d_mask, n_mask, ACC,
    )  # fmt: skip
    for i in range(tiles):
        t1 = tl.maximum(last - i * TILE - AHEAD, first)
        step = load_step(
            grad_rows, delta_rows, z_rows, c_rows, None, grad_l, delta_l, z_l, bc_l,
            order_row, t1, length, d_mask, n_mask, ACC,
        )  # fmt: skip
        if AHEAD == 0:
            now = step
        _offset, mask, delta_tile, dy, gate, c_tile, _b_tile = now
        c0, c1, c2, c3 = split_tokens(c_tile)
        if z is not None:
            dy *= gate * sigmoid(gate)
        _raw, dt = step_sizes(delta_tile, step_bias, SOFTPLUS, TERMS, mask)
        dt_sum += dt
        dt0, dt1, dt2, dt3 = split_tokens(dt)
        dy0, dy1, dy2, dy3 = split_tokens(dy)
        carry = adjoint_step(carry, a, dt3, dy3, c3)
        carry = adjoint_step(carry, a, dt2, dy2, c2)
        carry = adjoint_step(carry, a, dt1, dy1, c1)
        carry = adjoint_step(carry, a, dt0, dy0, c0)
        now = step

    tl.store(ends + row * N * channels + nd, carry, mask=nd_mask)
    tl.store(dt_sums + row * channels + d, tl.sum(dt_sum, 1), mask=d_mask)


@triton.jit
def token_gradients(carry, da, a, decay, previous, dt, u, dy, b, c):
    """Gradients of one token, given ``carry``, the gradient of h[t] that later tokens pass back.

    ``previous`` is h[t - 1], ``decay`` exp(dt A). Returns the gradient that the token passes back to h[t - 1], the sum
    for dA, and the token's dB (N,), du without the skip connection, and d(dt) (BLOCK_D,).
    """
    g = carry + c[:, None] * dy[None, :]  # adjoint of h[t]
    db = tl.sum(g * (dt * u)[None, :], 1)
    dx = tl.sum(g * b[:, None], 0)  # adjoint of x[t] = dt u
    carry = g * decay
    exponent = carry * previous  # adjoint of dt A
    ddt = u * dx + LN2 * tl.sum(exponent * a, 0)
    return carry, da + exponent * dt[None, :], db, dt * dx, ddt


@triton.jit
def load_pair(grad, u, delta, gate, grad_l, u_l, delta_l, gate_l, order_row, t0, length, d_mask, ACC: tl.constexpr):
    """What the backward pass needs of two tokens from t0 on and of the channels d; dy in place of a missing gate."""
    t = t0 + tl.arange(0, 2)
    offset = offsets(order_row, t, length)
    mask = d_mask[:, None] & (t < length)[None, :]
    dy = load_tile(grad, offset, grad_l, mask, ACC)
    gate_tile = dy if gate is None else load_tile(gate, offset, gate_l, mask, ACC)
    return (
        offset,
        mask,
        dy,
        load_tile(u, offset, u_l, mask, ACC),
        load_tile(delta, offset, delta_l, mask, ACC),
        gate_tile,
    )


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def backward_kernel(
    grad, u, delta, A, b, c, skip, z, bias, order, states,  # read
    carries, scratch,  # read and written
    du, ddelta, db, dc, dz, sums,  # written
    grad_batch, grad_d, grad_l, u_batch, u_d, u_l, delta_batch, delta_k, delta_d, delta_l, bc_batch, bc_row, bc_n, bc_l,
    z_batch, z_d, z_l, du_batch, du_k, du_d, du_l, ddelta_batch, ddelta_k, ddelta_d, ddelta_l,
    dbc_part, dbc_batch, dbc_row, dbc_n, dbc_l, dz_batch, dz_d, dz_l,
    directions, channels, channels_per_group, parts, length, segment_tokens,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
    SOFTPLUS: tl.constexpr, TERMS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Backward, pass 3: all gradients of each segment, chunk by chunk from its end.

    A program takes every ``parts``-th channel block of a group, one after the other within each chunk, and adds up dB
    and dC over them in memory that only it touches: db and dc have one copy for each of the ``parts``. Between chunks,
    the adjoint states wait in ``carries`` (sequence, segment, N, channels), which start as pass 2 left them. ``sums``
    (sequence, segment, N + 2, channels) are of the segment's tokens: dA, and in the last two rows dD and ddelta_bias.

    For each block, the chunk is first walked forwards from its checkpoint, to put the state at the start of each tile
    into ``scratch`` (one chunk's worth per program), then backwards. There, two tokens are handled at a time: what four
    need at once does not fit into the registers.
    """
    program = tl.program_id(0)
    groups = channels // channels_per_group
    segments = tl.cdiv(length, segment_tokens)
    part = program % parts
    group = (program // parts) % groups
    segment = (program // (parts * groups)) % segments
    sequence = (program // (parts * groups * segments)).to(tl.int64)
    batch = sequence // directions
    k = sequence % directions
    row = sequence * segments + segment
    n = tl.arange(0, BLOCK_N)  # 32-bit in the (N, BLOCK_D) tiles below, which would need too many registers else
    n_mask = n < N
    order_row = None if order is None else order + k * length
    long_n, long_part = n.to(tl.int64), part.to(tl.int64)
    b_rows = b + batch * bc_batch + (k + group) * bc_row + long_n * bc_n
    c_rows = c + batch * bc_batch + (k + group) * bc_row + long_n * bc_n
    db_rows = db + long_part * dbc_part + batch * dbc_batch + (k + group) * dbc_row + long_n * dbc_n
    dc_rows = dc + long_part * dbc_part + batch * dbc_batch + (k + group) * dbc_row + long_n * dbc_n
    own = scratch + program.to(tl.int64) * (TILES * BLOCK_N * BLOCK_D)
    own += (tl.arange(0, BLOCK_N) * BLOCK_D)[:, None] + tl.arange(0, BLOCK_D)[None, :]

    first = segment * segment_tokens
    segment_chunks = tl.cdiv(tl.minimum(segment_tokens, length - first), CHUNK)
    for chunk_back in range(segment_chunks):
        chunk_start = first + (segment_chunks - 1 - chunk_back) * CHUNK
        tiles = tl.cdiv(tl.minimum(CHUNK, length - chunk_start), TILE)
        for block in range(part, tl.cdiv(channels_per_group, BLOCK_D), parts):
            in_group = block * BLOCK_D + tl.arange(0, BLOCK_D)
            d = (group * channels_per_group + in_group).to(tl.int64)
            d_mask = in_group < channels_per_group
            nd = n[:, None] * channels + (in_group - block * BLOCK_D)[None, :]
            first_d = (group * channels_per_group + block * BLOCK_D).to(tl.int64)
            nd_mask = n_mask[:, None] & d_mask[None, :]
            a = tl.load(A + k * N * channels + first_d + nd, mask=nd_mask, other=0.0) * LOG2E
            step_bias = None if bias is None else tl.load(bias + k * channels + d, mask=d_mask, other=0.0)
            skip_d = None if skip is None else tl.load(skip + k * channels + d, mask=d_mask, other=0.0)
            grad_rows = grad + batch * grad_batch + d * grad_d
            u_rows = u + batch * u_batch + d * u_d
            delta_rows = delta + batch * delta_batch + k * delta_k + d * delta_d
            du_rows = du + batch * du_batch + k * du_k + d * du_d
            ddelta_rows = ddelta + batch * ddelta_batch + k * ddelta_k + d * ddelta_d
            z_rows = None if z is None else z + batch * z_batch + d * z_d
            dz_rows = None if z is None else dz + batch * dz_batch + d * dz_d

            checkpoint = (sequence * tl.cdiv(length, CHUNK) + chunk_start // CHUNK) * N * channels
            h = tl.load(states + checkpoint + first_d + nd, mask=nd_mask, other=0.0)
            tl.store(own, h)
            now = load_step(
                u_rows, delta_rows, None, b_rows, None, u_l, delta_l, 0, bc_l,
                order_row, chunk_start, length, d_mask, n_mask, ACC,
            )  # fmt: skip
            for i in range(1, tiles):  # of whole tiles: only the last one can be short
                t1 = chunk_start + (i - 1) * TILE + AHEAD
                step = load_step(
                    u_rows, delta_rows, None, b_rows, None, u_l, delta_l, 0, bc_l,
                    order_row, t1, length, d_mask, n_mask, ACC,
                )  # fmt: skip
                if AHEAD == 0:
                    now = step
                _offset, mask, delta_tile, u_tile, _gate, b_tile, _c_tile = now
                b0, b1, b2, b3 = split_tokens(b_tile)
                _raw, dt = step_sizes(delta_tile, step_bias, SOFTPLUS, TERMS, mask)
                dt0, dt1, dt2, dt3 = split_tokens(dt)
                x0, x1, x2, x3 = split_tokens(dt * u_tile)
                h = advance(h, a, dt0, x0, b0)
                h = advance(h, a, dt1, x1, b1)
                h = advance(h, a, dt2, x2, b2)
                h = advance(h, a, dt3, x3, b3)
                tl.store(own + i * (BLOCK_N * BLOCK_D), h)
                now = step
            tl.debug_barrier()  # one lane may read what another has written

            carry = tl.load(carries + row * N * channels + first_d + nd, mask=nd_mask, other=0.0)
            da_sum = tl.zeros((BLOCK_N, BLOCK_D), ACC)
            dskip_sum = tl.zeros((BLOCK_D, 2), ACC)
            dbias_sum = tl.zeros((BLOCK_D, 2), ACC)
            pair = load_pair(
                grad_rows, u_rows, delta_rows, z_rows, grad_l, u_l, delta_l, z_l,
                order_row, chunk_start + tiles * TILE - 2, length, d_mask, ACC,
            )  # fmt: skip
            for tile_back in range(tiles):
                i = tiles - 1 - tile_back
                tile_start = tl.load(own + i * (BLOCK_N * BLOCK_D))
                t0 = chunk_start + i * TILE
                t = t0 + tl.arange(0, 2)
                offset = offsets(order_row, t, length)
                mask = d_mask[:, None] & (t < length)[None, :]
                u_tile = load_tile(u_rows, offset, u_l, mask, ACC)
                delta_tile = load_tile(delta_rows, offset, delta_l, mask, ACC)
                _raw, dt = step_sizes(delta_tile, step_bias, SOFTPLUS, TERMS, mask)
                dt0, dt1 = tl.split(dt)
                x0, x1 = tl.split(dt * u_tile)
                b0 = load_vector(b_rows, order_row, t0, length, bc_l, n_mask, ACC)
                b1 = load_vector(b_rows, order_row, t0 + 1, length, bc_l, n_mask, ACC)
                tile_middle = advance(advance(tile_start, a, dt0, x0, b0), a, dt1, x1, b1)

                h0 = tile_middle
                for half in range(2):
                    t0 = chunk_start + i * TILE + 2 - 2 * half
                    t1 = tl.maximum(t0 - AHEAD // 2, chunk_start)
                    step = load_pair(
                        grad_rows, u_rows, delta_rows, z_rows, grad_l, u_l, delta_l, z_l,
                        order_row, t1, length, d_mask, ACC,
                    )  # fmt: skip
                    if AHEAD == 0:
                        pair = step
                    offset, mask, dy, u_tile, delta_tile, gate = pair
                    tile_mask = n_mask[:, None] & (t0 + tl.arange(0, 2) < length)[None, :]
                    sum_mask = tile_mask & (block > part)  # the first block starts the sums
                    db_pointers = db_rows[:, None] + (offset * dbc_l)[None, :]
                    dc_pointers = dc_rows[:, None] + (offset * dbc_l)[None, :]
                    db_sum = tl.load(db_pointers, mask=sum_mask, other=0.0)
                    dc_sum = tl.load(dc_pointers, mask=sum_mask, other=0.0)
                    if z is not None:
                        gate_sigmoid = sigmoid(gate)
                        dgate = dy * gate_sigmoid * (1.0 + gate * (1.0 - gate_sigmoid))
                        dy *= gate * gate_sigmoid
                    raw, dt = step_sizes(delta_tile, step_bias, SOFTPLUS, TERMS, mask)
                    dt0, dt1 = tl.split(dt)
                    u0, u1 = tl.split(u_tile)
                    dy0, dy1 = tl.split(dy)
                    b0 = load_vector(b_rows, order_row, t0, length, bc_l, n_mask, ACC)
                    b1 = load_vector(b_rows, order_row, t0 + 1, length, bc_l, n_mask, ACC)
                    c0 = load_vector(c_rows, order_row, t0, length, bc_l, n_mask, ACC)
                    c1 = load_vector(c_rows, order_row, t0 + 1, length, bc_l, n_mask, ACC)
                    decay0 = tl.exp2(a * dt0[None, :])
                    decay1 = tl.exp2(a * dt1[None, :])
                    h1 = decay0 * h0 + b0[:, None] * (dt0 * u0)[None, :]
                    h2 = decay1 * h1 + b1[:, None] * (dt1 * u1)[None, :]
                    dc_tile = tl.join(tl.sum(h1 * dy0[None, :], 1), tl.sum(h2 * dy1[None, :], 1))
                    tl.store(dc_pointers, dc_sum + dc_tile, mask=tile_mask)
                    if z is not None:
                        y = tl.join(tl.sum(h1 * c0[:, None], 0), tl.sum(h2 * c1[:, None], 0))
                        if skip is not None:
                            y += skip_d[:, None] * u_tile
                        store_tile(dz_rows, offset, dz_l, dgate * y, mask)

                    carry, da_sum, db1, du1, ddt1 = token_gradients(carry, da_sum, a, decay1, h1, dt1, u1, dy1, b1, c1)
                    carry, da_sum, db0, du0, ddt0 = token_gradients(carry, da_sum, a, decay0, h0, dt0, u0, dy0, b0, c0)
                    tl.store(db_pointers, db_sum + tl.join(db0, db1), mask=tile_mask)
                    ddt = tl.join(ddt0, ddt1)
                    if SOFTPLUS:
                        ddt = tl.where(raw > 20.0, ddt, ddt * sigmoid(raw))
                    if bias is not None:
                        dbias_sum += tl.where(mask, ddt, 0.0)
                    store_tile(ddelta_rows, offset, ddelta_l, ddt, mask)
                    du_tile = tl.join(du0, du1)
                    if skip is not None:
                        du_tile += skip_d[:, None] * dy
                        dskip_sum += dy * u_tile
                    store_tile(du_rows, offset, du_l, du_tile, mask)
                    h0 = tile_start
                    pair = step

            tl.store(carries + row * N * channels + first_d + nd, carry, mask=nd_mask)
            own_sums = sums + row * (N + 2) * channels + first_d
            earlier = nd_mask & (chunk_back > 0)  # the last chunk starts the sums
            tl.store(own_sums + nd, tl.load(own_sums + nd, mask=earlier, other=0.0) + da_sum, mask=nd_mask)
            of_d = own_sums + N * channels + tl.arange(0, BLOCK_D)
            earlier = d_mask & (chunk_back > 0)
            if skip is not None:
                tl.store(of_d, tl.load(of_d, mask=earlier, other=0.0) + tl.sum(dskip_sum, 1), mask=d_mask)
            if bias is not None:
                of_d += channels
                tl.store(of_d, tl.load(of_d, mask=earlier, other=0.0) + tl.sum(dbias_sum, 1), mask=d_mask)
            tl.debug_barrier()  # the next block, or chunk, reads and overwrites what this one has written
