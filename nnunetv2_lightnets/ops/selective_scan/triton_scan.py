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
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nnunetv2_lightnets.ops.selective_scan.record import CHUNK, Gradients, Scan, n_chunks, saved_states

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
        out, _, _ = forward(Scan(u, u, A, B, B), False)
        values = out.flatten().tolist()
    except Exception as error:  # compilers and drivers raise what they like
        return f"a scan of two tokens fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if not math.isclose(values[1], 1 + math.exp(-1), rel_tol=1e-5):
        return f"a scan of two tokens gives {values[1]} instead of {1 + math.exp(-1)}"
    return None


def refuses(scan: Scan) -> str | None:
    """Why it cannot take this call; None if it can."""
    wanted = "cpu" if _interpreted() else "cuda"
    if scan.u.device.type != wanted:
        return f"takes tensors on {wanted}, not on {scan.u.device.type}"
    if scan.u.dtype not in _DTYPES:
        return f"takes float32, float16, bfloat16 and float64, not {scan.u.dtype}"
    if scan.A.shape[-1] > _MAX_STATES:
        return f"takes up to {_MAX_STATES} states per channel, not {scan.A.shape[-1]}"
    if not 0 < scan.u.shape[-1] <= _MAX_LENGTH:
        return f"takes 1 to {_MAX_LENGTH} tokens, not {scan.u.shape[-1]}"
    return None


class _Prepared:
    """A scan as the kernels read it: always with a dimension of directions, K = 1 in a plain scan.

    Parameters are contiguous, ``initial_state`` is (B * K, 1, N, D), and exp(dt A) = exp2(dt A_log2e).
    """

    def __init__(self, scan: Scan) -> None:
        s = scan.with_directions()
        self.u, self.delta, self.B, self.C, self.z = s.u, s.delta, s.B, s.C, s.z
        self.A_log2e = (s.A * math.log2(math.e)).transpose(1, 2).contiguous()  # (K, N, D)
        self.D, self.delta_bias, self.order = (
            None if x is None else x.contiguous() for x in (s.D, s.delta_bias, s.order)
        )
        self.initial_state = None if s.initial_state is None else _end_states(s.initial_state)
        self.delta_softplus = s.delta_softplus
        self.dtype = s.dtype
        self.directions, self.states, self.channels = self.A_log2e.shape
        self.sequences, self.length = s.u.shape[0] * self.directions, s.u.shape[2]
        self.groups = s.B.shape[1] // self.directions

    def new(self, *shape: int) -> Tensor:
        return self.A_log2e.new_empty(shape)

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
            "A_log2e": self.A_log2e,
            "bias": self.delta_bias,
            "order": self.order,
            **_tensor("delta", self.delta, "batch k d l"),
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


def _end_states(states: Tensor) -> Tensor:
    """Initial or last states (B, [K,] D, N), or their gradients, as the kernels read them: (B * K, 1, N, D)."""
    return states.reshape(-1, 1, *states.shape[-2:]).transpose(2, 3).contiguous()


def _power_of_two(size: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (size - 1).bit_length()


def _ceil_div(size: int, part: int) -> int:
    return -(-size // part)


def _tensor(name: str, x: Tensor | None, axes: str) -> dict[str, Any]:
    """A tensor and its strides ``name_axis`` as kernel arguments; strides of 0 where it is absent and never touched."""
    names = [f"{name}_{axis}" for axis in axes.split()]
    return {name: x, **dict(zip(names, [0] * len(names) if x is None else x.stride(), strict=True))}


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


def _starts(scan: _Prepared, ends: Tensor, dt_sums: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
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
        "A_log2e": scan.A_log2e,
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
        reduction = {"first_states": None, "starts": None, "run_ends": run_ends, "run_dt_sums": run_sums}
        _launch(_kernels().carry_kernel, programs, {**arguments, **reduction})
        first = _starts(scan, run_ends, run_sums, first, reverse)
    starts = torch.empty_like(ends)
    spread = {"first_states": first, "starts": starts, "run_ends": None, "run_dt_sums": None}
    _launch(_kernels().carry_kernel, programs, {**arguments, **spread})
    return starts


def _forward(scan: _Prepared, out: Tensor, last_state: Tensor, save_states: bool) -> Tensor:
    """Fill ``out`` (B, K, D, L) and ``last_state`` (B, [K,] D, N); return the saved states."""
    kernels = _kernels()
    block_d = scan.channel_block(_FORWARD_TILE)
    arguments = scan.arguments(block_d)
    blocks = scan.groups * arguments["blocks_per_group"]
    wanted = _FORWARD_PROGRAMS * _multiprocessors(scan.u.device)
    segments, segment_tokens = _cut(scan.length, scan.sequences * blocks, wanted)
    arguments |= {
        **_tensor("u", scan.u, "batch d l"),
        **_tensor("b", scan.B, "batch row n l"),
        "blocks": blocks,
        "segments": segments,
        "segment_tokens": segment_tokens,
    }
    programs = scan.sequences * blocks * segments
    starts = scan.initial_state
    if segments > 1:
        ends = scan.new(scan.sequences, segments, scan.states, scan.channels)
        dt_sums = scan.new(scan.sequences, segments, scan.channels)
        _launch(kernels.segment_ends_kernel, programs, {**arguments, "ends": ends, "dt_sums": dt_sums})
        starts = _starts(scan, ends, dt_sums, scan.initial_state, reverse=False)

    chunks = n_chunks(scan.length)
    saved = scan.new(scan.sequences * chunks * scan.states * scan.channels if save_states else 0)
    arguments |= {
        "skip": scan.D,
        "starts": starts,
        "states": saved if save_states else None,
        "last_state": last_state,
        **_tensor("c", scan.C, "batch row n l"),
        **_tensor("z", scan.z, "batch d l"),
        **_tensor("out", out, "batch k d l"),
        "chunks": chunks,
    }
    _launch(kernels.forward_kernel, programs, arguments)
    return saved


class _BackwardPlan:
    """How the backward pass is cut into programs; see ``backward_kernel`` for ``parts``.

    Channel blocks share a program, one after the other, as far as chunks alone fill the GPU.
    """

    def __init__(self, scan: _Prepared) -> None:
        self.block_d = scan.channel_block(_BACKWARD_TILE)
        blocks = _ceil_div(scan.channels // scan.groups, self.block_d)
        wanted = _BACKWARD_PROGRAMS * _multiprocessors(scan.u.device)
        rows = scan.sequences * scan.groups
        self.segments, self.segment_tokens = _cut(scan.length, rows * blocks, wanted)
        chunks = n_chunks(scan.length) if self.segments > 1 else 1
        self.parts = min(blocks, _ceil_div(wanted, rows * chunks))
        if self.segments > 1:
            self.segments, self.segment_tokens = _cut(scan.length, rows * self.parts, wanted)


def _carries(scan: _Prepared, plan: _BackwardPlan, arguments: dict[str, Any], grad_last_state: Tensor | None) -> Tensor:
    """Passes 1 and 2: gradients of the states at the end of all segments, (sequences, segments, N, D)."""
    last = None if grad_last_state is None else _end_states(grad_last_state)
    shape = (scan.sequences, plan.segments, scan.states, scan.channels)
    if plan.segments == 1:
        return scan.new(*shape).zero_() if last is None else last.clone()
    ends, dt_sums = scan.new(*shape), scan.new(scan.sequences, plan.segments, scan.channels)
    walk = {**arguments, **scan.arguments(scan.channel_block(_FORWARD_TILE)), "ends": ends, "dt_sums": dt_sums}
    walk["blocks"] = blocks = scan.groups * walk["blocks_per_group"]
    _launch(_kernels().adjoint_ends_kernel, scan.sequences * blocks * plan.segments, walk)
    return _starts(scan, ends, dt_sums, last, reverse=True)


def _launch_backward(
    scan: _Prepared, plan: _BackwardPlan, grads: tuple[Tensor, Tensor | None], states: Tensor
) -> dict[str, Any]:
    """Run all passes; return what the last one writes, under the names of its arguments.

    ``du`` is (K, B, D, L), ``db`` and ``dc`` have copies for all parts, ``da``, ``dskip`` and ``dbias`` are of single
    sequences and segments, (sequences, segments, ...), as are ``carries``: gradients of the states before segments.
    """
    kernels = _kernels()
    grad_out, grad_last_state = grads
    arguments = scan.arguments(plan.block_d)
    if not scan.tuned and scan.states > 2:
        arguments["num_warps"] = 4  # one would not have the registers
    arguments |= {
        **_tensor("grad", grad_out, "batch d l"),
        **_tensor("c", scan.C, "batch row n l"),
        **_tensor("z", scan.z, "batch d l"),
        "segments": plan.segments,
        "segment_tokens": plan.segment_tokens,
    }
    carries = _carries(scan, plan, arguments, grad_last_state)
    programs = scan.sequences * scan.groups * plan.parts * plan.segments
    per_channel = (scan.sequences, plan.segments, scan.channels)
    du = _per_direction(scan)
    written = {
        "carries": carries,
        "du": du,
        "ddelta": torch.empty_like(scan.delta),
        "db": _copies(scan.B, plan.parts, scan.dtype),
        "dc": _copies(scan.C, plan.parts, scan.dtype),
        "dz": None if scan.z is None else torch.empty_like(scan.z),
        "da": torch.zeros_like(carries),
        "dskip": None if scan.D is None else scan.new(*per_channel).zero_(),
        "dbias": None if scan.delta_bias is None else scan.new(*per_channel).zero_(),
    }
    arguments |= {
        **written,
        "skip": scan.D,
        "states": states,
        "scratch": scan.new(programs * CHUNK // kernels.TILE.value * _power_of_two(scan.states) * plan.block_d),
        **_tensor("u", scan.u, "batch d l"),
        **_tensor("b", scan.B, "batch row n l"),
        **_tensor("du", du, "k batch d l"),
        **_tensor("ddelta", written["ddelta"], "batch k d l"),
        **_tensor("db", written["db"], "part batch row n l"),
        **_tensor("dc", written["dc"], "part batch row n l"),
        **_tensor("dz", written["dz"], "batch d l"),
        "groups": scan.groups,
        "parts": plan.parts,
        "chunks": n_chunks(scan.length),
    }
    _launch(kernels.backward_kernel, programs, arguments)
    return written


def _per_direction(scan: _Prepared) -> Tensor:
    """An output or du of each direction, (K, B, D, L), in the layout of u; in float32 at least if there are several."""
    if scan.order is None:
        return torch.empty_like(scan.u).unsqueeze(0)
    return _copies(scan.u, scan.directions, scan.dtype)


def _copies(like: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``count`` empty tensors one after the other, each in the shape and memory layout of ``like``."""
    strides = torch.empty_like(like, device="meta").stride()
    return torch.empty_strided((count, *like.shape), (like.numel(), *strides), dtype=dtype, device=like.device)


def _sum_of_copies(copies: Tensor, like: Tensor) -> Tensor:
    """The sum of what :func:`_copies` made, in the dtype and layout of ``like``."""
    if len(copies) == 1:
        return copies[0].to(like.dtype)
    return torch.sum(copies, 0, out=torch.empty_like(like, dtype=copies.dtype)).to(like.dtype)


def forward(scan: Scan, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, D, L), last state (B, [K,] D, N) and the states before every chunk, (B, K, chunk, N, D) flat."""
    prepared = _Prepared(scan)
    out = _per_direction(prepared)
    last_state = prepared.new(*scan.state_shape)
    with _on(scan.u.device):
        saved = _forward(prepared, out.transpose(0, 1), last_state, save_states)
    return _sum_of_copies(out, scan.u), last_state, saved


def backward(scan: Scan, grads: tuple[Tensor, Tensor | None], states: Tensor) -> Gradients:
    """Gradients of the scan's tensors."""
    prepared = _Prepared(scan)
    states = saved_states(scan, states, forward)
    with _on(scan.u.device):
        written = _launch_backward(prepared, _BackwardPlan(prepared), grads, states)

    def over_images(x: Any) -> Any:
        """(B * K, segments, ...) to (K, ...)."""
        return None if x is None else x.view(-1, scan.directions, *x.shape[1:]).sum((0, 2))

    return scan.gradients(
        _sum_of_copies(written["du"], scan.u),
        written["ddelta"],
        over_images(written["da"]).transpose(1, 2),
        _sum_of_copies(written["db"], scan.B),
        _sum_of_copies(written["dc"], scan.C),
        over_images(written["dskip"]),
        written["dz"],
        over_images(written["dbias"]),
        written["carries"][:, 0].transpose(1, 2),
    )


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
