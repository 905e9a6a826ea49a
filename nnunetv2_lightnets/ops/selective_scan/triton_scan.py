"""Backend "triton": the selective scan on GPUs, with the compiler that comes with torch.

Method: mamba-ssm's kernel walks each channel's sequence from end to end, which leaves a GPU idle that has one image of
64 channels and two million voxels. Here a sequence is cut into segments, runs of whole chunks of ``CHUNK`` tokens:

1. every segment finds how it would end if it started from zero, and the sum of its step sizes;
2. as a state decays over a segment by exp(A * that sum), a short scan over segments gives the state each starts with;
3. every segment computes its outputs from there, and saves the state at the start of each chunk.

The backward pass does the same from the last token to the first with the adjoint state, and recomputes each chunk's
states from the saved one. Where a batch has enough images and channels to fill the GPU, there is one segment, and
pass 3 is all there is.

Nothing depends on the order in which programs run: there are no atomic operations, and the same call on the same kind
of GPU gives the same bits. Sums over channels (dB, dC) are taken by one program in a fixed order, or by several into
copies that are then added up; sums over directions (the output and du of the directional scan) and over segments (dA,
dD, ddelta_bias) are added up from copies, too. Directional scans read tokens where ``order`` says; no sequence is ever
copied, stacked or flipped.

Bytes moved, per token and channel, where ``w`` is the bytes of an input element (4, or 2 in half precision), ``N`` the
number of states, ``D`` the channels of a group, and ``p`` the copies of dB and dC (1 for long sequences):

=================  =================  ==========================================================================
pass               must move          moves beyond that
=================  =================  ==========================================================================
forward 1          (not needed)       2w (u, delta) + w N / D (B); not run where there is one segment
forward 3          3w + 2w N / D      4N / 64 for saved states (only if gradients follow); with a gate w must be
                                      read, too
backward 1         (not needed)       2w (gradient, delta) + w N / D (C), w for a gate; not run with one segment
backward 3         5w + 4w N / D      4N / 64 (saved states); 2N each way for ``scratch`` and 8 N / BLOCK_D each way
                                      for the sums of dB and dC, which stay in the caches as long as these hold one
                                      chunk per running program; 16 (p - 1) N / D + 8 N / D for adding up p > 1 copies
=================  =================  ==========================================================================

The directional scan's ``K`` directions each read u, and each write an output and a du in the compute dtype, which are
then added up: 4 K to write and 4 K to read where w would do.

Pass 2 moves 3 * 4 N bytes per segment and channel. What the caches really save has not been measured: no GPU was at
hand (docs/selective_scan.md).

Sources: Gu and Dao, "Mamba", arXiv:2312.00752, section 3.3.2 (recomputation, states kept on chip) and appendix D; the
three passes are the textbook's parallel prefix sum over blocks (Blelloch, "Prefix Sums and Their Applications",
CMU-CS-90-190, section 1.3).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nnunetv2_lightnets.ops.selective_scan.layout import CHUNK, n_chunks

NAME = "triton"

_MAX_STATES = 256
_MAX_LENGTH = 2**30  # token counts are 32-bit numbers in the kernels
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Elements of the state tile that a warp keeps in registers, a thread having 255 at most: 16 per thread forwards, 8
# backwards, where the gradients need several tiles at once. Half as many in float64.
_FORWARD_TILE = 512
_BACKWARD_TILE = 256
_MAX_REGISTERS = 255
# Programs wanted for each multiprocessor: about as many as their registers let it hold.
_FORWARD_PROGRAMS = 16
_BACKWARD_PROGRAMS = 8
# Segments that one program of pass 2 walks; more are first reduced to runs of this many.
_RUN = 32


def _interpreted() -> bool:
    """Whether Triton interprets kernels with NumPy, which takes tensors on the CPU: for tests, as it is very slow."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _kernels() -> ModuleType:
    """The kernels' module; importing it imports Triton."""
    from nnunetv2_lightnets.ops.selective_scan import triton_kernels

    return triton_kernels


@cache
def unavailable() -> str | None:
    """Why Triton cannot run here: no GPU, no Triton, or a failing scan of two tokens; None if it can."""
    if not _interpreted() and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        _kernels()
    except Exception as error:  # a broken installation can raise anything; it must not reach users of other backends
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    try:
        device = "cpu" if _interpreted() else "cuda"
        u = torch.ones(1, 1, 2, device=device)
        A, B = torch.full((1, 1), -1.0, device=device), torch.ones(1, 1, 1, 2, device=device)
        out, _, _ = forward(u, u, A, B, B, None, None, None, False, False)
        values = out.flatten().tolist()
    except Exception as error:  # compilers and drivers raise what they like
        return f"a scan of two tokens fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if not math.isclose(values[1], 1 + math.exp(-1), rel_tol=1e-5):
        return f"a scan of two tokens gives {values[1]} instead of {1 + math.exp(-1)}"
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
    """Why it cannot take this call; None if it can."""
    wanted = "cpu" if _interpreted() else "cuda"
    if u.device.type != wanted:
        return f"takes tensors on {wanted}, not on {u.device.type}"
    if u.dtype not in _DTYPES:
        return f"takes float32, float16, bfloat16 and float64, not {u.dtype}"
    if A.shape[-1] > _MAX_STATES:
        return f"takes up to {_MAX_STATES} states per channel, not {A.shape[-1]}"
    if not 0 < u.shape[-1] <= _MAX_LENGTH:
        return f"takes 1 to {_MAX_LENGTH} tokens, not {u.shape[-1]}"
    return None


@dataclass(frozen=True)
class _Scan:
    """The arguments of a plain or directional scan in one form, and how they are cut into programs.

    The plain scan has one direction and ``groups`` rows of B and C; the directional scan has one group and a row of B
    and C for each direction. Only the plain scan has a gate.
    """

    u: Tensor  # (B, D, L)
    delta: Tensor  # (B, K, D, L)
    rates: Tensor  # (K, N, D) contiguous, A * log2(e)
    B: Tensor  # (B, G, N, L) or (B, K, N, L)
    C: Tensor
    D: Tensor | None  # (K, D) contiguous
    z: Tensor | None  # (B, D, L)
    delta_bias: Tensor | None  # (K, D) contiguous
    delta_softplus: bool
    order: Tensor | None  # (K, L) contiguous

    @property
    def directions(self) -> int:
        return self.rates.shape[0]

    @property
    def states(self) -> int:
        return self.rates.shape[1]

    @property
    def sequences(self) -> int:
        return self.u.shape[0] * self.directions

    @property
    def channels(self) -> int:
        return self.u.shape[1]

    @property
    def length(self) -> int:
        return self.u.shape[2]

    @property
    def groups(self) -> int:
        return self.B.shape[1] // self.directions

    @property
    def dtype(self) -> torch.dtype:
        return self.rates.dtype

    def new(self, *shape: int) -> Tensor:
        return self.rates.new_empty(shape)

    @property
    def tuned(self) -> bool:
        """Whether this is what tiles and registers are tuned for: scans of the published networks.

        Groups start at multiples of 16 channels there, so that a thread takes several of a row of states at once.
        """
        aligned = self.channels % 16 == 0 and self.channels // self.groups % 16 == 0
        return aligned and self.states == 16 and self.dtype == torch.float32

    def channel_block(self, tile: int) -> int:
        """Channels per program, so that states x channels make a tile of at most ``tile`` elements."""
        if self.dtype == torch.float64:
            tile //= 2
        fitting = max(1, tile // _power_of_two(self.states))
        return min(32, fitting, _power_of_two(self.channels // self.groups))

    def arguments(self, block_d: int) -> dict[str, Any]:
        """What every kernel over tokens takes."""
        channels_per_group = self.channels // self.groups
        return {
            "delta": self.delta,
            "rates": self.rates,
            "bias": self.delta_bias,
            "order": self.order,
            **_strides("delta", self.delta, "batch", "k", "d", "l"),
            "directions": self.directions,
            "channels": self.channels,
            "channels_per_group": channels_per_group,
            "blocks_per_group": _ceil_div(channels_per_group, block_d),
            "length": self.length,
            "SOFTPLUS": self.delta_softplus,
            "TERMS": 17 if self.dtype == torch.float64 else 7,  # of the series in softplus, for the dtype's precision
            **self.constants(block_d),
        }

    def constants(self, block_d: int) -> dict[str, Any]:
        """What every kernel is compiled for, and how."""
        language = _kernels().tl
        constants = {
            "N": self.states,
            "BLOCK_N": _power_of_two(self.states),
            "BLOCK_D": block_d,
            "ACC": language.float64 if self.dtype == torch.float64 else language.float32,
            "num_warps": 1,
        }
        if not self.tuned:
            # Left alone, the assembler spills a few bytes where it then finds room for another warp.
            constants["maxnreg"] = _MAX_REGISTERS
        return constants


def _power_of_two(size: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (size - 1).bit_length()


def _ceil_div(size: int, part: int) -> int:
    return -(-size // part)


def _strides(name: str, x: Tensor | None, *axes: str) -> dict[str, int]:
    """Strides as kernel arguments ``name_axis``; 0 for an absent tensor, which no kernel touches."""
    values = (0,) * len(axes) if x is None else x.stride()
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, values, strict=True)}


def _launch(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    """Run a kernel."""
    kernel[(programs,)](**arguments)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _cut(length: int, programs: int, wanted: int) -> tuple[int, int]:
    """Segments per sequence, and tokens per segment, for ``programs`` programs per segment to become ``wanted``.

    Segments cost a second run over the tokens: with fewer than three, that would be no gain.
    """
    chunks = n_chunks(length)
    segments = min(chunks, _ceil_div(wanted, programs))
    if segments < 3:
        return 1, chunks * CHUNK
    chunks_per_segment = _ceil_div(chunks, segments)
    return _ceil_div(chunks, chunks_per_segment), chunks_per_segment * CHUNK


def _starts(scan: _Scan, ends: Tensor, dt_sums: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
    """Pass 2: states at the start of all segments (at their end, for the adjoint, where ``reverse``).

    Args:
        scan: The scan.
        ends: Segments' end states from zero, (sequences, segments, N, D).
        dt_sums: Sums of their step sizes, (sequences, segments, D).
        first: The state at the start of each sequence, (sequences, 1, N, D); None for zero.
        reverse: Whether the last segment comes first.
    """
    segments = ends.shape[1]
    runs = 1 if segments <= _RUN else _ceil_div(segments, _RUN)
    block_d = scan.channel_block(_FORWARD_TILE)
    arguments = {
        "ends": ends,
        "dt_sums": dt_sums,
        "rates": scan.rates,
        "directions": scan.directions,
        "channels": scan.channels,
        "segments": segments,
        "run": _ceil_div(segments, runs) if runs == 1 else _RUN,
        "runs": runs,
        "REVERSE": reverse,
        **scan.constants(block_d),
    }
    programs = scan.sequences * runs * _ceil_div(scan.channels, block_d)
    if runs > 1:
        run_ends = scan.new(scan.sequences, runs, scan.states, scan.channels)
        run_sums = scan.new(scan.sequences, runs, scan.channels)
        reduction = {"first_states": None, "starts": None, "group_ends": run_ends, "group_dt_sums": run_sums}
        _launch(_kernels().carry_kernel, programs, {**arguments, **reduction})
        first = _starts(scan, run_ends, run_sums, first, reverse)
    starts = torch.empty_like(ends)
    spread = {"first_states": first, "starts": starts, "group_ends": None, "group_dt_sums": None}
    _launch(_kernels().carry_kernel, programs, {**arguments, **spread})
    return starts


def _forward(scan: _Scan, out: Tensor, last_state: Tensor | None, save_states: bool) -> Tensor:
    """Fill ``out`` (B, K, D, L) and ``last_state`` (B, D, N); return the saved states."""
    kernels = _kernels()
    block_d = scan.channel_block(_FORWARD_TILE)
    arguments = scan.arguments(block_d)
    blocks = scan.groups * arguments["blocks_per_group"]
    wanted = _FORWARD_PROGRAMS * _multiprocessors(scan.u.device)
    segments, segment_tokens = _cut(scan.length, scan.sequences * blocks, wanted)
    arguments |= {
        "u": scan.u,
        "b": scan.B,
        **_strides("u", scan.u, "batch", "d", "l"),
        **_strides("b", scan.B, "batch", "row", "n", "l"),
        "blocks": blocks,
        "segments": segments,
        "segment_tokens": segment_tokens,
    }
    programs = scan.sequences * blocks * segments
    starts = None
    if segments > 1:
        ends = scan.new(scan.sequences, segments, scan.states, scan.channels)
        dt_sums = scan.new(scan.sequences, segments, scan.channels)
        _launch(kernels.segment_ends_kernel, programs, {**arguments, "ends": ends, "dt_sums": dt_sums})
        starts = _starts(scan, ends, dt_sums, None, reverse=False)

    chunks = n_chunks(scan.length)
    saved = scan.new(scan.sequences * chunks * scan.states * scan.channels if save_states else 0)
    arguments |= {
        "c": scan.C,
        "skip": scan.D,
        "z": scan.z,
        "starts": starts,
        "out": out,
        "states": saved if save_states else None,
        "last_state": last_state,
        **_strides("c", scan.C, "batch", "row", "n", "l"),
        **_strides("z", scan.z, "batch", "d", "l"),
        **_strides("out", out, "batch", "k", "d", "l"),
        "chunks": chunks,
    }
    _launch(kernels.forward_kernel, programs, arguments)
    return saved


@dataclass(frozen=True)
class _Gradients:
    """What the backward kernels write."""

    u: Tensor  # (B, K, D, L)
    delta: Tensor  # (B, K, D, L)
    A: Tensor  # (K, D, N)
    B: Tensor  # as B
    C: Tensor  # as C
    D: Tensor | None  # (K, D)
    delta_bias: Tensor | None  # (K, D)


def _backward(
    scan: _Scan, grad_out: Tensor, grad_last_state: Tensor | None, du: Tensor, dz: Tensor | None, states: Tensor
) -> _Gradients:
    """Fill ``du`` (B, K, D, L) and ``dz`` (B, D, L); return these and the other gradients.

    Args:
        scan: The scan.
        grad_out: Gradient of the output, (B, D, L); all directions receive it.
        grad_last_state: Gradient of the last state, (B, D, N).
        du: Gradient of u of each direction, (B, K, D, L).
        dz: Gradient of the gate, (B, D, L).
        states: What the forward pass saved.
    """
    kernels = _kernels()
    block_d = scan.channel_block(_BACKWARD_TILE)
    arguments = scan.arguments(block_d)
    if not scan.tuned and scan.states > 2:
        arguments["num_warps"] = 4  # one would not have the registers
    blocks_per_group = arguments["blocks_per_group"]
    wanted = _BACKWARD_PROGRAMS * _multiprocessors(scan.u.device)
    rows = scan.sequences * scan.groups
    chunks = n_chunks(scan.length)
    # Channel blocks share a program, one after the other, as far as chunks alone fill the GPU.
    segments, segment_tokens = _cut(scan.length, rows * blocks_per_group, wanted)
    parts = min(blocks_per_group, _ceil_div(wanted, rows * (chunks if segments > 1 else 1)))
    if segments > 1:
        segments, segment_tokens = _cut(scan.length, rows * parts, wanted)
    arguments |= {
        "grad_out": grad_out,
        "c": scan.C,
        "z": scan.z,
        **_strides("grad", grad_out, "batch", "d", "l"),
        **_strides("c", scan.C, "batch", "row", "n", "l"),
        **_strides("z", scan.z, "batch", "d", "l"),
        "segments": segments,
        "segment_tokens": segment_tokens,
    }
    shape = (scan.sequences, segments, scan.states, scan.channels)
    last = None
    if grad_last_state is not None:
        last = grad_last_state.transpose(1, 2).unsqueeze(1).contiguous()  # (B, 1, N, D)
    if segments > 1:
        ends, dt_sums = scan.new(*shape), scan.new(scan.sequences, segments, scan.channels)
        walk_d = scan.channel_block(_FORWARD_TILE)
        walk = {**arguments, **scan.arguments(walk_d), "ends": ends, "dt_sums": dt_sums}
        walk["blocks"] = blocks = scan.groups * walk["blocks_per_group"]
        _launch(kernels.adjoint_ends_kernel, scan.sequences * blocks * segments, walk)
        carries = _starts(scan, ends, dt_sums, last, reverse=True)
    elif last is not None:
        carries = last.clone()
    else:
        carries = scan.new(*shape).zero_()

    programs = rows * parts * segments
    tile = _power_of_two(scan.states) * block_d
    db, dc = _copies(scan.B, parts, scan.dtype), _copies(scan.C, parts, scan.dtype)
    ddelta = torch.empty_like(scan.delta)
    da = scan.new(*shape).zero_()
    dskip = None if scan.D is None else scan.new(scan.sequences, segments, scan.channels).zero_()
    dbias = None if scan.delta_bias is None else scan.new(scan.sequences, segments, scan.channels).zero_()
    arguments |= {
        "u": scan.u,
        "b": scan.B,
        "skip": scan.D,
        "states": states,
        "carries": carries,
        "scratch": scan.new(programs * CHUNK // kernels.TILE.value * tile),
        "du": du,
        "ddelta": ddelta,
        "db": db,
        "dc": dc,
        "dz": dz,
        "da": da,
        "dskip": dskip,
        "dbias": dbias,
        **_strides("u", scan.u, "batch", "d", "l"),
        **_strides("b", scan.B, "batch", "row", "n", "l"),
        **_strides("du", du, "batch", "k", "d", "l"),
        **_strides("ddelta", ddelta, "batch", "k", "d", "l"),
        **_strides("db", db, "part", "batch", "row", "n", "l"),
        **_strides("dc", dc, "part", "batch", "row", "n", "l"),
        **_strides("dz", dz, "batch", "d", "l"),
        "groups": scan.groups,
        "parts": parts,
        "chunks": chunks,
    }
    _launch(kernels.backward_kernel, programs, arguments)

    def over_images(x: Tensor) -> Tensor:
        """(B * K, segments, ...) to (K, ...)."""
        return x.view(-1, scan.directions, *x.shape[1:]).sum((0, 2))

    return _Gradients(
        du,
        ddelta,
        over_images(da).transpose(1, 2),
        _sum_of_copies(db, scan.B),
        _sum_of_copies(dc, scan.C),
        None if dskip is None else over_images(dskip),
        None if dbias is None else over_images(dbias),
    )


def _copies(like: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``count`` empty tensors one after the other, each in the shape and memory layout of ``like``."""
    strides = torch.empty_like(like, device="meta").stride()
    return torch.empty_strided((count, *like.shape), (like.numel(), *strides), dtype=dtype, device=like.device)


def _sum_of_copies(copies: Tensor, like: Tensor) -> Tensor:
    """The sum of what :func:`_copies` made, in the dtype and layout of ``like``."""
    if len(copies) == 1:
        return copies[0].to(like.dtype)
    return torch.sum(copies, 0, out=torch.empty_like(like, dtype=copies.dtype)).to(like.dtype)


def _rates(A: Tensor) -> Tensor:
    """(K, D, N) to contiguous (K, N, D), in units of log2(e): exp(dt A) = exp2(dt rates)."""
    return (A * math.log2(math.e)).transpose(1, 2).contiguous()


def _plain(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> _Scan:
    """A plain scan is a directional one with one direction, in order."""
    return _Scan(
        u,
        delta.unsqueeze(1),
        _rates(A.unsqueeze(0)),
        B,
        C,
        None if D is None else D.unsqueeze(0).contiguous(),
        z,
        None if delta_bias is None else delta_bias.unsqueeze(0).contiguous(),
        delta_softplus,
        None,
    )


def _directional(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: Tensor,
) -> _Scan:
    return _Scan(
        u,
        delta,
        _rates(A),
        B,
        C,
        None if D is None else D.contiguous(),
        None,
        None if delta_bias is None else delta_bias.contiguous(),
        delta_softplus,
        order.contiguous(),
    )


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
    """Output (B, D, L) in u's dtype and layout, last state (B, D, N), and the states at the chunks' starts (flat)."""
    scan = _plain(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    out = torch.empty_like(u)
    last_state = scan.new(u.shape[0], u.shape[1], scan.states)
    with _on(u.device):
        saved = _forward(scan, out.unsqueeze(1), last_state, save_states)
    return out, last_state, saved


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
    """Gradients of u, delta, A, B, C, D, z and delta_bias."""
    scan = _plain(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    du = torch.empty_like(u)
    dz = None if z is None else torch.empty_like(z)
    with _on(u.device):
        found = _backward(scan, grad_out, grad_last_state, du.unsqueeze(1), dz, states)
    return (
        du,
        found.delta.squeeze(1),
        found.A[0],
        found.B,
        found.C,
        None if found.D is None else found.D[0],
        dz,
        None if found.delta_bias is None else found.delta_bias[0],
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
    """Output (B, D, L), summed over directions, in u's dtype; the states at the chunks' starts (flat)."""
    scan = _directional(u, delta, A, B, C, D, delta_bias, delta_softplus, order)
    out = _copies(u, scan.directions, scan.dtype)  # (K, B, D, L)
    with _on(u.device):
        saved = _forward(scan, out.transpose(0, 1), None, save_states)
    return _sum_of_copies(out, u), saved


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
    """Gradients of u, delta, A, B, C, D and delta_bias."""
    scan = _directional(u, delta, A, B, C, D, delta_bias, delta_softplus, order)
    du = _copies(u, scan.directions, scan.dtype)  # (K, B, D, L)
    with _on(u.device):
        found = _backward(scan, grad_y, None, du.transpose(0, 1), None, states)
    return (
        _sum_of_copies(du, u),
        found.delta,
        found.A,
        found.B,
        found.C,
        found.D,
        found.delta_bias,
    )


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
