"""Backend "triton": the selective scan on GPUs, with the compiler that comes with torch.

Method: mamba-ssm's kernel walks each channel's sequence from end to end, which leaves a GPU idle that has one image of
64 channels and two million voxels. Here a sequence is cut into segments, runs of whole chunks of ``CHUNK`` tokens:

1. every segment finds how it would end if it started from zero, and the sum of its step sizes;
2. as a state decays over a segment by exp(A * that sum), a short scan over segments gives the state each starts with;
3. every segment computes its outputs from there, and saves the state at the start of each chunk.

The backward pass does the same from the last token to the first with the adjoint state, and recomputes each chunk's
states from the saved one. Where a batch has enough images and channels to fill the GPU, there is one segment, and
pass 3 is all there is.

How many channels a program takes, how many programs a multiprocessor is given, and whether tokens are loaded ahead is
chosen by measurement on the GPU itself, from a few candidates (``ops/tuning.py``).

Nothing depends on the order in which programs run: there are no atomic operations, and the same call with the same
choice gives the same bits. Sums over channels (dB, dC) are taken by one program in a fixed order, or by several into
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

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.ops import triton_runtime as runtime
from nnunetv2_lightnets.ops import tuning
from nnunetv2_lightnets.ops.selective_scan import probe
from nnunetv2_lightnets.ops.selective_scan.record import CHUNK, Gradients, Scan, n_chunks, saved_states
from nnunetv2_lightnets.ops.tensors import in_one_line

NAME = "triton"
_logger = logging.getLogger("nnunetv2_lightnets")

_MAX_STATES = 256
_MAX_LENGTH = 2**30  # token counts are 32-bit numbers in the kernels
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MAX_REGISTERS = 255
# Segments that one program of pass 2 walks; more are first reduced to runs of this many.
_RUN = 32


@dataclass(frozen=True)
class Tiles:
    """How a pass is cut into programs."""

    elements: int  # states x channels that a warp keeps in registers, of which a thread has 255; half in float64
    programs: int  # wanted for each multiprocessor: about as many as their registers let it hold
    ahead: int  # tokens that a walk loads before they are needed: 0, or the 4 of one step

    def __str__(self) -> str:
        return f"{self.elements} elements, {self.programs} programs, {self.ahead} tokens ahead"


# Candidates, the first of which is taken where nothing is measured. Backwards, gradients need several tiles at once.
FORWARD = (Tiles(512, 12, 4), Tiles(1024, 8, 0), Tiles(256, 16, 4))
BACKWARD = (Tiles(256, 8, 0), Tiles(128, 12, 4), Tiles(256, 16, 0))


@dataclass(frozen=True)
class _Proof:
    """What was found out about scans of a kind on a GPU."""

    fault: str | None  # why none of the candidates can be trusted; None if some can
    forward: tuple[Tiles, ...]  # candidates that compute right
    backward: tuple[Tiles, ...]


_proofs: dict[tuple[int, str], _Proof] = {}


@cache
def _kernels() -> ModuleType:
    """The kernels' module; importing it imports Triton."""
    from nnunetv2_lightnets.ops.selective_scan import triton_kernels

    return triton_kernels


def unavailable() -> str | None:
    """Why Triton cannot run on the current GPU; None if it can. :func:`refuses` proves its scans there."""
    return runtime.unavailable()


def refuses(scan: Scan) -> str | None:
    """Why it cannot take this call; None if it can."""
    device, wanted = scan.u.device, runtime.device_type()
    if device.type != wanted:
        return f"takes tensors on {wanted}, not on {device.type}"
    if scan.u.dtype not in _DTYPES:
        return f"takes float32, float16, bfloat16 and float64, not {scan.u.dtype}"
    if scan.A.shape[-1] > _MAX_STATES:
        return f"takes up to {_MAX_STATES} states per channel, not {scan.A.shape[-1]}"
    if not 0 < scan.u.shape[-1] <= _MAX_LENGTH:
        return f"takes 1 to {_MAX_LENGTH} tokens, not {scan.u.shape[-1]}"
    return _fault(device.index, probe.kind_of(scan)) if device.type == "cuda" else None


def _fault(device: int, kind: str) -> str | None:
    """Why scans of a kind fail on this GPU, or give other results than the reference; None if they do not."""
    try:
        return runtime.unavailable(device) or _proved(device, kind).fault
    except torch.OutOfMemoryError as error:  # it may be otherwise at the next call
        return f"its scans cannot be checked on this GPU now ({in_one_line(error)})"


def _proved(device: int, kind: str) -> _Proof:
    """Whether scans of a kind can be trusted on this GPU, and with which candidates; found out at the first call.

    Raises:
        LightNetsError: If that call is made while a CUDA graph is recorded, when nothing can be compiled or compared.
    """
    proof = _proofs.get((device, kind))
    if proof is None:
        if torch.cuda.is_current_stream_capturing():
            raise LightNetsError(
                f"the first {kind} scan on this GPU is in a CUDA graph, but its kernels have to be compiled and "
                "checked before: run the network once, forwards and backwards, and record the graph then"
            )
        proof = _proofs[device, kind] = _prove(torch.device("cuda", device), kind)
    return proof


def _prove(device: torch.device, kind: str) -> _Proof:
    proved, faults = [], []
    for forward_tiles, backward_tiles in zip(FORWARD, BACKWARD, strict=True):
        name = f"triton ({forward_tiles}; {backward_tiles})"
        compute = partial(forward, tiles=forward_tiles), partial(backward, tiles=backward_tiles)
        reason = probe.fault(name, kind, *compute, device)
        if reason is None:
            proved.append((forward_tiles, backward_tiles))
        else:
            faults.append(reason)
            _logger.info("scan backend %s: not taken: %s", name, reason)
    return _Proof(None if proved else faults[0], tuple(x for x, _ in proved), tuple(x for _, x in proved))


class _Prepared:
    """A scan as the kernels read it: always with a dimension of directions, K = 1 in a plain scan.

    Parameters are contiguous, ``initial_state`` is (B * K, 1, N, D), and B and C have the same strides.
    """

    def __init__(self, scan: Scan) -> None:
        s = scan.with_directions()
        self.u, self.delta, self.B, self.C, self.z = s.u, s.delta, s.B, s.C, s.z
        if s.B.stride() != s.C.stride():
            self.B, self.C = (x.mT.contiguous().mT for x in (s.B, s.C))
        self.A = s.A.mT.contiguous()  # (K, N, D)
        self.D, self.delta_bias, self.order = (
            None if x is None else x.contiguous() for x in (s.D, s.delta_bias, s.order)
        )
        self.initial_state = None if s.initial_state is None else _end_states(s.initial_state)
        self.delta_softplus = s.delta_softplus
        self.dtype = s.dtype
        self.directions, self.states, self.channels = self.A.shape
        self.sequences, self.length = s.u.shape[0] * self.directions, s.u.shape[2]
        self.groups = s.B.shape[1] // self.directions

    def new(self, *shape: int) -> Tensor:
        return self.A.new_empty(shape)

    @property
    def published(self) -> bool:
        """Whether this is what the tables of candidates are made for: scans of the published networks.

        Groups start at multiples of 16 channels there, so that a thread takes several of a row of states at once.
        """
        aligned = self.channels % 16 == 0 and self.channels // self.groups % 16 == 0
        return aligned and self.states == 16 and self.dtype == torch.float32

    def channel_block(self, elements: int) -> int:
        """Channels per program, so that states x channels make a tile of at most so many elements."""
        if self.dtype == torch.float64:
            elements //= 2
        fitting = max(1, elements // _power_of_two(self.states))
        return min(64, fitting, _power_of_two(self.channels // self.groups))

    def blocks(self, block_d: int) -> int:
        """Blocks of channels in all groups."""
        return self.groups * runtime.ceil_div(self.channels // self.groups, block_d)

    def arguments(self, block_d: int, ahead: int) -> dict[str, Any]:
        """What every kernel over tokens takes."""
        return {
            "A": self.A,
            "bias": self.delta_bias,
            "order": self.order,
            **_tensor("delta", self.delta, "batch k d l"),
            **_strides("bc", self.B, "batch row n l"),
            "directions": self.directions,
            "channels": self.channels,
            "channels_per_group": self.channels // self.groups,
            "length": self.length,
            "AHEAD": ahead,
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
            "enable_fp_fusion": True,  # multiply-adds; later versions of Triton will want to be told
        }
        if not self.published:
            # Left alone, the assembler may spill a few bytes where it then finds room for another warp.
            constants["maxnreg"] = _MAX_REGISTERS
        return constants


def _end_states(states: Tensor) -> Tensor:
    """Initial or last states (B, [K,] D, N), or their gradients, as the kernels read them: (B * K, 1, N, D)."""
    return states.reshape(-1, 1, *states.shape[-2:]).transpose(2, 3).contiguous()


def _power_of_two(size: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (size - 1).bit_length()


def _strides(name: str, x: Tensor | None, axes: str) -> dict[str, Any]:
    """The strides ``name_axis`` of a tensor as kernel arguments; 0 where it is absent and never touched."""
    names = [f"{name}_{axis}" for axis in axes.split()]
    return dict(zip(names, [0] * len(names) if x is None else x.stride(), strict=True))


def _tensor(name: str, x: Tensor | None, axes: str) -> dict[str, Any]:
    """A tensor and its strides as kernel arguments."""
    return {name: x, **_strides(name, x, axes)}


def _cut(length: int, programs: int, wanted: int) -> tuple[int, int]:
    """Segments per sequence, and tokens per segment, for ``programs`` programs per segment to become ``wanted``.

    Segments cost a second run over the tokens: with fewer than three, that would be no gain.
    """
    chunks = n_chunks(length)
    segments = min(chunks, runtime.ceil_div(wanted, programs))
    if segments < 3:
        return 1, chunks * CHUNK
    chunks_per_segment = runtime.ceil_div(chunks, segments)
    return runtime.ceil_div(chunks, chunks_per_segment), chunks_per_segment * CHUNK


def _starts(
    scan: _Prepared, tiles: Tiles, ends: Tensor, dt_sums: Tensor, first: Tensor | None, reverse: bool
) -> Tensor:
    """Pass 2: states at the start of all segments (at their end, for the adjoint, where ``reverse``).

    Args:
        scan: The scan.
        tiles: Of which pass 2 needs the channels of a program alone.
        ends: Segments' end states from zero, (sequences, segments, N, D).
        dt_sums: Sums of their step sizes, (sequences, segments, D).
        first: The state at the start of each sequence, (sequences, 1, N, D); None for zero.
        reverse: Whether the last segment comes first.
    """
    segments = ends.shape[1]
    runs = 1 if segments <= _RUN else runtime.ceil_div(segments, _RUN)
    block_d = scan.channel_block(tiles.elements)
    arguments = {
        "ends": ends,
        "dt_sums": dt_sums,
        "A": scan.A,
        "directions": scan.directions,
        "channels": scan.channels,
        "segments": segments,
        "run": segments if runs == 1 else _RUN,
        "runs": runs,
        "REVERSE": reverse,
        **scan.constants(block_d),
    }
    programs = scan.sequences * runs * runtime.ceil_div(scan.channels, block_d)
    if runs > 1:
        run_ends = scan.new(scan.sequences, runs, scan.states, scan.channels)
        run_sums = scan.new(scan.sequences, runs, scan.channels)
        reduction = {"first_states": None, "starts": None, "run_ends": run_ends, "run_dt_sums": run_sums}
        runtime.launch(_kernels().carry_kernel, programs, {**arguments, **reduction})
        first = _starts(scan, tiles, run_ends, run_sums, first, reverse)
    starts = torch.empty_like(ends)
    spread = {"first_states": first, "starts": starts, "run_ends": None, "run_dt_sums": None}
    runtime.launch(_kernels().carry_kernel, programs, {**arguments, **spread})
    return starts


def _forward(scan: _Prepared, tiles: Tiles, out: Tensor, last_state: Tensor, save_states: bool) -> Tensor:
    """Fill ``out`` (B, K, D, L) and ``last_state`` (B, [K,] D, N); return the saved states."""
    kernels = _kernels()
    block_d = scan.channel_block(tiles.elements)
    blocks = scan.sequences * scan.blocks(block_d)
    segments, segment_tokens = _cut(scan.length, blocks, tiles.programs * runtime.multiprocessors(scan.u.device))
    arguments = {
        **scan.arguments(block_d, tiles.ahead),
        **_tensor("u", scan.u, "batch d l"),
        "b": scan.B,
        "segment_tokens": segment_tokens,
    }
    starts = scan.initial_state
    if segments > 1:
        ends = scan.new(scan.sequences, segments, scan.states, scan.channels)
        dt_sums = scan.new(scan.sequences, segments, scan.channels)
        runtime.launch(kernels.segment_ends_kernel, blocks * segments, {**arguments, "ends": ends, "dt_sums": dt_sums})
        starts = _starts(scan, tiles, ends, dt_sums, scan.initial_state, reverse=False)

    saved = scan.new(scan.sequences * n_chunks(scan.length) * scan.states * scan.channels if save_states else 0)
    arguments |= {
        "c": scan.C,
        "skip": scan.D,
        "starts": starts,
        "states": saved if save_states else None,
        "last_state": last_state,
        **_tensor("z", scan.z, "batch d l"),
        **_tensor("out", out, "batch k d l"),
    }
    runtime.launch(kernels.forward_kernel, blocks * segments, arguments)
    return saved


class _BackwardPlan:
    """How the backward pass is cut into programs; see ``backward_kernel`` for ``parts``.

    Channel blocks share a program, one after the other, as far as chunks alone fill the GPU.
    """

    def __init__(self, scan: _Prepared, tiles: Tiles) -> None:
        self.tiles = tiles
        self.block_d = scan.channel_block(tiles.elements)
        blocks = runtime.ceil_div(scan.channels // scan.groups, self.block_d)
        wanted = tiles.programs * runtime.multiprocessors(scan.u.device)
        rows = scan.sequences * scan.groups
        self.segments, self.segment_tokens = _cut(scan.length, rows * blocks, wanted)
        chunks = n_chunks(scan.length) if self.segments > 1 else 1
        self.parts = min(blocks, runtime.ceil_div(wanted, rows * chunks))
        if self.segments > 1:
            self.segments, self.segment_tokens = _cut(scan.length, rows * self.parts, wanted)


def _carries(scan: _Prepared, plan: _BackwardPlan, arguments: dict[str, Any], grad_last_state: Tensor | None) -> Tensor:
    """Passes 1 and 2: gradients of the states at the end of all segments, (sequences, segments, N, D)."""
    last = None if grad_last_state is None else _end_states(grad_last_state)
    shape = (scan.sequences, plan.segments, scan.states, scan.channels)
    if plan.segments == 1:
        return scan.new(*shape).zero_() if last is None else last.clone()
    ends, dt_sums = scan.new(*shape), scan.new(scan.sequences, plan.segments, scan.channels)
    tiles = FORWARD[0]  # it walks as the forward pass does
    block_d = scan.channel_block(tiles.elements)
    walk = {**arguments, **scan.arguments(block_d, tiles.ahead), "ends": ends, "dt_sums": dt_sums}
    programs = scan.sequences * scan.blocks(block_d) * plan.segments
    runtime.launch(_kernels().adjoint_ends_kernel, programs, walk)
    return _starts(scan, tiles, ends, dt_sums, last, reverse=True)


def _backward(scan: _Prepared, tiles: Tiles, grads: tuple[Tensor, Tensor | None], states: Tensor) -> dict[str, Any]:
    """Run all passes; return what the last one writes, under the names of its arguments.

    ``du`` is (K, B, D, L), ``db`` and ``dc`` have copies for all parts, ``sums`` are of single sequences and segments,
    as are ``carries``: gradients of the states before segments.
    """
    kernels, plan = _kernels(), _BackwardPlan(scan, tiles)
    grad_out, grad_last_state = grads
    arguments = {
        **_tensor("grad", grad_out, "batch d l"),
        **_tensor("z", scan.z, "batch d l"),
        "c": scan.C,
        "segment_tokens": plan.segment_tokens,
    }
    carries = _carries(scan, plan, arguments, grad_last_state)
    programs = scan.sequences * scan.groups * plan.parts * plan.segments
    du, dbc = _per_direction(scan), _copies(scan.B, 2 * plan.parts, scan.dtype)
    written = {
        "carries": carries,
        "du": du,
        "ddelta": torch.empty_like(scan.delta),
        "db": dbc[: plan.parts],
        "dc": dbc[plan.parts :],
        "dz": None if scan.z is None else torch.empty_like(scan.z),
        "sums": scan.new(scan.sequences, plan.segments, scan.states + 2, scan.channels),
    }
    arguments |= {
        **scan.arguments(plan.block_d, tiles.ahead),
        **written,
        "b": scan.B,
        "skip": scan.D,
        "states": states,
        "scratch": scan.new(programs * CHUNK // kernels.TILE.value * _power_of_two(scan.states) * plan.block_d),
        **_tensor("u", scan.u, "batch d l"),
        **_strides("du", du, "k batch d l"),
        **_strides("ddelta", written["ddelta"], "batch k d l"),
        **_strides("dbc", dbc, "part batch row n l"),
        **_strides("dz", written["dz"], "batch d l"),
        "parts": plan.parts,
    }
    arguments["maxnreg"] = _MAX_REGISTERS
    if not scan.published and scan.states > 2:
        arguments["num_warps"] = 4  # one would not have the registers
    runtime.launch(kernels.backward_kernel, programs, arguments)
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


def _choose(scan: _Prepared, backwards: bool, run: Callable[[Tiles], object]) -> Tiles:
    """The best tiles for such scans on this GPU: of its kind, dtype, channels, and length to a power of 4."""
    device, kind = scan.u.device, probe.KINDS[scan.order is not None]
    table: tuple[Tiles, ...] = BACKWARD if backwards else FORWARD
    if device.type == "cuda":
        proof = _proved(device.index, kind)
        table = (proof.backward if backwards else proof.forward) or table
    if not scan.published:
        return table[0]
    size = f"{scan.sequences} x {scan.channels} x about {4 ** round(math.log(scan.length, 4))}"
    layout = "channels-last" if scan.u.stride(1) == 1 else "channels-first"
    key = (kind, str(scan.u.dtype), "no gate" if scan.z is None else "gate", layout, size)
    return tuning.choose(f"scan, {'backward' if backwards else 'forward'}", key, table, run, device)


def forward(scan: Scan, save_states: bool, tiles: Tiles | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, D, L), last state (B, [K,] D, N) and the states before every chunk, (B, K, chunk, N, D) flat."""
    prepared = _Prepared(scan)
    out = _per_direction(prepared)
    last_state = prepared.new(*scan.state_shape)

    def run(tiles: Tiles) -> Tensor:
        return _forward(prepared, tiles, out.transpose(0, 1), last_state, save_states)

    with runtime.on(scan.u.device):
        saved = run(tiles or _choose(prepared, False, run))
    return _sum_of_copies(out, scan.u), last_state, saved


def backward(scan: Scan, grads: tuple[Tensor, Tensor | None], states: Tensor, tiles: Tiles | None = None) -> Gradients:
    """Gradients of the scan's tensors."""
    prepared = _Prepared(scan)
    states = saved_states(scan, states, forward)

    def run(tiles: Tiles) -> dict[str, Any]:
        return _backward(prepared, tiles, grads, states)

    with runtime.on(scan.u.device):
        written = run(tiles or _choose(prepared, True, run))
    # over images and segments: (B * K, segments, N + 2, D) to (K, N + 2, D)
    sums = written["sums"].view(-1, scan.directions, *written["sums"].shape[1:]).sum((0, 2))
    return scan.gradients(
        _sum_of_copies(written["du"], scan.u),
        written["ddelta"],
        sums[:, : prepared.states].transpose(1, 2),
        _sum_of_copies(written["db"], scan.B),
        _sum_of_copies(written["dc"], scan.C),
        None if scan.D is None else sums[:, -2],
        written["dz"],
        None if scan.delta_bias is None else sums[:, -1],
        written["carries"][:, 0].transpose(1, 2),
    )
