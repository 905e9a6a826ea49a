# mypy: ignore-errors
# ruff: noqa: RUF005
# (The functions below are written in Triton's language, which only looks like Python; it takes no starred tuples.)
"""Triton kernels of the causal convolution; ``causal_conv1d_triton.py`` launches them and says what they move.

A program works on a tile of ``BLOCK_D`` channels and ``TOKENS * BLOCK_L`` tokens. A thread owns ``TOKENS`` tokens in a
row of its channels, so that what the ``WIDTH`` taps share stays in its registers: ``x`` is loaded
``TOKENS + WIDTH - 1`` times for ``TOKENS`` outputs, all but the neighbours' tokens from memory once.

``ROWS`` says that channels are neighbours in memory: a tile is then (BLOCK_L, BLOCK_D), else (BLOCK_D, BLOCK_L), and
neighbouring threads touch neighbouring memory in both. Offsets are 64-bit. ``ACC`` is the compute dtype.

Padding needs no special cases: tokens before the start and past the end are 0, and so are their gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that change from call to call and that no memory access is aligned by: one compilation serves all their values.
SIZES = ("length", "blocks", "parts", "tiles_per_part")


@triton.jit
def along_channels(values, ROWS: tl.constexpr):
    """(BLOCK_D,) as a row or column of a tile."""
    return values[None, :] if ROWS else values[:, None]


@triton.jit
def along_tokens(values, ROWS: tl.constexpr):
    """(BLOCK_L,) as a column or row of a tile."""
    return values[:, None] if ROWS else values[None, :]


@triton.jit
def load_tokens(x, t, stride_l, length, d_mask, ACC: tl.constexpr):
    """A tile of the tokens t; 0 where there are none. ``x`` points to the channels."""
    mask = d_mask & (t >= 0) & (t < length)
    return tl.load(x + t.to(tl.int64) * stride_l, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_window(x, t, stride_l, length, d_mask, COUNT: tl.constexpr, ACC: tl.constexpr):
    """Tiles of the tokens t, t + 1, ..., ``COUNT`` of them."""
    window = (load_tokens(x, t, stride_l, length, d_mask, ACC),)
    for i in tl.static_range(1, COUNT):
        window = window + (load_tokens(x, t + i, stride_l, length, d_mask, ACC),)
    return window


@triton.jit
def load_taps(weight, d, d_mask, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """The kernels' taps, each in the shape of ``d``."""
    taps = (tl.load(weight + d * WIDTH, mask=d_mask, other=0.0).to(ACC),)
    for k in tl.static_range(1, WIDTH):
        taps = taps + (tl.load(weight + d * WIDTH + k, mask=d_mask, other=0.0).to(ACC),)
    return taps


@triton.jit
def convolve(window, FIRST: tl.constexpr, taps, offset, WIDTH: tl.constexpr):
    """The value before SiLU of the token that ``window[FIRST + WIDTH - 1]`` is."""
    out = window[FIRST + WIDTH - 1] * taps[WIDTH - 1]
    if offset is not None:
        out += offset
    for k in tl.static_range(WIDTH - 1):
        out += window[FIRST + k] * taps[k]
    return out


@triton.jit
def locate(channels, blocks, parts, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Image, part of its tokens, and channels of a program; channel blocks run fastest, as rows may share sectors."""
    program = tl.program_id(0)
    d = along_channels((program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D), ROWS)
    rest = program // blocks
    return (rest // parts).to(tl.int64), rest % parts, d.to(tl.int64), d < channels


@triton.jit(do_not_specialize=SIZES)
def conv_forward_kernel(
    x, weight, bias,  # read
    y,  # written
    x_batch, x_d, x_l, y_batch, y_d, y_l, channels, length, blocks, parts,
    WIDTH: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Outputs of one tile."""
    batch, part, d, d_mask = locate(channels, blocks, parts, BLOCK_D, ROWS)
    taps = load_taps(weight, d, d_mask, WIDTH, ACC)
    offset = None if bias is None else tl.load(bias + d, mask=d_mask, other=0.0).to(ACC)
    y_rows = y + batch * y_batch + d * y_d
    t = along_tokens((part * BLOCK_L + tl.arange(0, BLOCK_L)) * TOKENS, ROWS)
    window = load_window(x + batch * x_batch + d * x_d, t - (WIDTH - 1), x_l, length, d_mask, TOKENS + WIDTH - 1, ACC)
    for i in tl.static_range(TOKENS):
        out = convolve(window, i, taps, offset, WIDTH)
        if SILU:
            out *= tl.sigmoid(out)
        tl.store(y_rows + (t + i).to(tl.int64) * y_l, out.to(y.dtype.element_ty), mask=d_mask & (t + i < length))


@triton.jit(do_not_specialize=SIZES)
def conv_backward_kernel(
    x, weight, bias, grad,  # read
    dx, sums,  # written
    x_batch, x_d, x_l, grad_batch, grad_d, grad_l, dx_batch, dx_d, dx_l,
    channels, length, blocks, parts, tiles_per_part,
    WIDTH: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients: dx of a part's tiles, one after the other; and its share of dweight and dbias.

    ``sums`` (images, parts, WIDTH + 1, channels) takes the taps' gradients, then the bias's.
    """
    batch, part, d, d_mask = locate(channels, blocks, parts, BLOCK_D, ROWS)
    taps = load_taps(weight, d, d_mask, WIDTH, ACC)
    offset = None if bias is None else tl.load(bias + d, mask=d_mask, other=0.0).to(ACC)
    x_rows = x + batch * x_batch + d * x_d
    grad_rows = grad + batch * grad_batch + d * grad_d
    dx_rows = dx + batch * dx_batch + d * dx_d
    zero = tl.zeros((BLOCK_L, BLOCK_D) if ROWS else (BLOCK_D, BLOCK_L), ACC)
    totals = (zero,)
    for _k in tl.static_range(WIDTH):
        totals = totals + (zero,)
    first = part * tiles_per_part
    for tile in range(first, first + tiles_per_part):
        t = along_tokens((tile * BLOCK_L + tl.arange(0, BLOCK_L)) * TOKENS, ROWS)
        window = load_window(x_rows, t - (WIDTH - 1), x_l, length, d_mask, TOKENS + 2 * (WIDTH - 1), ACC)
        inner = load_window(grad_rows, t, grad_l, length, d_mask, TOKENS + WIDTH - 1, ACC)
        if SILU:
            inner = through_silu(window, inner, taps, offset, TOKENS + WIDTH - 1, WIDTH)
        for i in tl.static_range(TOKENS):
            out = inner[i] * taps[WIDTH - 1]
            for k in tl.static_range(1, WIDTH):
                out += inner[i + k] * taps[WIDTH - 1 - k]
            tl.store(dx_rows + (t + i).to(tl.int64) * dx_l, out.to(dx.dtype.element_ty), mask=d_mask & (t + i < length))
        totals = add_products(totals, window, inner, TOKENS, WIDTH)
    row = sums + (batch * parts + part) * (WIDTH + 1) * channels
    for k in tl.static_range(WIDTH + 1):
        total = tl.sum(totals[k], 0 if ROWS else 1, keep_dims=True)
        tl.store(row + k * channels + d, total, mask=d_mask)


@triton.jit
def through_silu(window, grads, taps, offset, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Gradients of the values before SiLU, which are computed again, from those of the outputs."""
    inner = (silu_gradient(grads[0], convolve(window, 0, taps, offset, WIDTH)),)
    for i in tl.static_range(1, COUNT):
        inner = inner + (silu_gradient(grads[i], convolve(window, i, taps, offset, WIDTH)),)
    return inner


@triton.jit
def silu_gradient(grad, before):
    """Gradient of ``before`` from that of ``silu(before)``."""
    gate = tl.sigmoid(before)
    return grad * gate * (1.0 + before * (1.0 - gate))


@triton.jit
def add_products(totals, window, inner, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """``totals`` with what a tile adds to the gradients of taps and bias."""
    added = (add_product(totals[0], window, 0, inner, TOKENS),)
    for k in tl.static_range(1, WIDTH):
        added = added + (add_product(totals[k], window, k, inner, TOKENS),)
    total = totals[WIDTH]
    for i in tl.static_range(TOKENS):
        total += inner[i]
    return added + (total,)


@triton.jit
def add_product(total, window, K: tl.constexpr, inner, TOKENS: tl.constexpr):
    """``total`` with a tile's products of tokens and gradients that are a tap apart."""
    for i in tl.static_range(TOKENS):
        total += inner[i] * window[i + K]
    return total
