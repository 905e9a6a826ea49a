"""The C kernel computes the textbook recurrence, its gradients and the causal convolution, in any layout and size."""

from __future__ import annotations

import ctypes
import itertools
import math
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.ops import causal_conv1d_native, native_library, use_backend
from nnunetv2_lightnets.ops.scan_order import scan_order
from nnunetv2_lightnets.ops.selective_scan import native
from nnunetv2_lightnets.ops.selective_scan.dispatch import NAMES as BACKENDS
from nnunetv2_lightnets.ops.selective_scan.record import Scan
from tests.ops.operator_call import operator_arguments

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

# max |error| / max |value| against float64; sums over channels or tokens and half-precision outputs have more
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
LAYOUTS = ("channels last", "tokens last", "strided")


@pytest.fixture(params=native_library.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    native_library.use_instruction_set(request.param)
    yield request.param
    native_library.use_instruction_set(native_library.instruction_sets()[0])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that has not been written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def textbook(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state and states (B, chunk, N, D) at the start of every chunk, one token after the other."""
    channels_per_group = u.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(channels_per_group, 1), C.repeat_interleave(channels_per_group, 1)  # (B, D, N, L)
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    if delta_softplus:
        step = torch.logaddexp(step, torch.zeros_like(step))
    h = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype) if initial_state is None else initial_state
    outputs, starts = [], []
    for t in range(u.shape[2]):
        if t % 64 == 0:
            starts.append(h.transpose(1, 2))
        h = torch.exp(step[..., t, None] * A) * h + (step * u)[..., t, None] * B[..., t]
        outputs.append((h * C[..., t]).sum(-1))
    y = torch.stack(outputs, -1)
    if D is not None:
        y = y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h, torch.stack(starts, 1)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers with channels or tokens as neighbours in memory, or with gaps between all of them."""
    if layout == "channels last":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "tokens last":
        return x.contiguous()
    gaps = torch.full([2 * size + 1 for size in x.shape], math.nan, dtype=x.dtype)
    view = gaps[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


Arguments = list[Tensor | None]


def make(
    shape: tuple[int, int, int],
    states: int,
    groups: int = 1,
    *,
    layout: str = "channels last",
    dtype: torch.dtype = torch.float32,
    without: tuple[str, ...] = (),
    softplus: bool = True,
) -> tuple[Arguments, Tensor, Tensor]:
    """Arguments of a scan, and gradients of its output and last state."""
    batch, channels, length = shape
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    delta = torch.randn(shape, dtype=torch.float64)
    values = {
        "u": torch.randn(shape),
        "delta": delta if softplus else delta.abs() / 4,
        "A": -torch.rand(channels, states) * 3 - 0.05,
        "B": torch.randn(batch, groups, states, length),
        "C": torch.randn(batch, groups, states, length),
        "D": torch.randn(channels),
        "z": torch.randn(shape),
        "delta_bias": torch.randn(channels) / 4 - (0.5 if softplus else -1),
        "initial_state": torch.randn(batch, channels, states),
    }
    arguments: Arguments = []
    for name, value in values.items():
        if name in without:
            arguments.append(None)
        elif name in ("A", "D", "delta_bias", "initial_state"):
            arguments.append(value.to(compute))
        else:
            arguments.append(laid_out(value.to(dtype), layout))
    return (
        arguments,
        laid_out(torch.randn(shape).to(dtype), layout),
        torch.randn(batch, channels, states, dtype=compute),
    )


def record(arguments: Sequence[Tensor | None], softplus: bool, order: Tensor | None = None) -> Scan:
    """The arguments as backends take them."""
    scan: Any = dict(zip(NAMES, arguments, strict=False))
    return Scan(**scan, order=order, delta_softplus=softplus)


def error(x: Tensor, expected: Tensor) -> float:
    assert x.shape == expected.shape
    return float((x.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)) if x.numel() else 0.0


def doubled(arguments: Arguments) -> Arguments:
    return [None if x is None else x.detach().double().contiguous().requires_grad_() for x in arguments]


def check_scan(arguments: Arguments, grad_out: Tensor, grad_last: Tensor | None, softplus: bool) -> None:
    exact: list[Any] = doubled(arguments)
    y, last, starts = textbook(*exact, softplus)
    loss = (y * grad_out.double()).sum()
    if grad_last is not None:
        loss = loss + (last * grad_last.double()).sum()
    given = [x for x in exact if x is not None]
    expected = iter(torch.autograd.grad(loss, given))

    call: list[Any] = arguments
    out, last_state, states = native.forward(record(call, softplus), True)
    gradients = native.backward(record(call, softplus), (grad_out, grad_last), states)
    tolerance = TOLERANCE[call[0].dtype]
    assert out.dtype == call[0].dtype
    assert error(out, y.detach()) < tolerance
    exact_tolerance = min(tolerance, TOLERANCE[torch.float32])
    assert error(last_state, last.detach()) < exact_tolerance
    assert error(states, starts.detach().flatten()) < exact_tolerance
    for name, argument, gradient in zip(NAMES, arguments, gradients, strict=True):
        if argument is None:
            assert gradient is None
        else:
            assert gradient is not None
            assert gradient.dtype == argument.dtype
            assert error(gradient, next(expected)) < tolerance, name


SHAPES = [  # (B, D, L), N, G: whole blocks; tails of channels and states; one token; one channel; groups
    ((1, 16, 128), 16, 1),
    ((2, 37, 70), 5, 1),
    ((3, 7, 1), 1, 1),
    ((1, 1, 65), 33, 1),
    ((2, 24, 40), 16, 3),
    ((1, 48, 64), 4, 2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "states", "groups"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scan_is_the_textbooks(
    instruction_set: str,
    poisoned: None,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    states: int,
    groups: int,
    layout: str,
) -> None:
    arguments, grad_out, grad_last = make(shape, states, groups, layout=layout, dtype=dtype)
    check_scan(arguments, grad_out, grad_last, True)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize(
    "without", [c for n in range(5) for c in itertools.combinations(("D", "z", "delta_bias", "initial_state"), n)]
)
def test_scan_with_and_without_each_option(poisoned: None, without: tuple[str, ...], softplus: bool) -> None:
    arguments, grad_out, _ = make((1, 20, 70), 6, without=without, softplus=softplus)
    check_scan(arguments, grad_out, None, softplus)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(instruction_set: str, dtype: torch.dtype, layout: str) -> None:
    arguments, grad_out, grad_last = make((2, 20, 70), 6, 2, layout=layout, dtype=dtype)
    check_scan(arguments, grad_out, grad_last, True)
    # and rounded only once, at the end
    call: list[Any] = arguments
    single: list[Any] = [None if x is None else x.float() for x in call]
    out, wide = native.forward(record(call, True), False)[0], native.forward(record(single, True), False)[0]
    assert torch.equal(out, wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)  # all there are: subnormal, infinite, NaN
    weight = torch.ones(1, 1)
    back = causal_conv1d_native.forward(every.view(1, 1, -1), weight, None, False).flatten()
    nan = every.isnan()
    assert torch.equal(back.isnan(), nan)
    small = every.float().abs() < 2.0**-126  # such states are taken as zero
    assert torch.equal(back[~nan & ~small], every[~nan & ~small])
    ties = torch.cat([torch.randn(20000) * 10.0**e for e in range(-8, 6)])
    ties = torch.cat([ties, (every[~nan].float() * (1 + 2.0**-9)), (every[~nan].float() * (1 + 2.0**-12))])
    ties = ties[ties.abs() > 2.0**-120]
    # A float32 weight brings any float32 number into the output of a half-precision call.
    ones = torch.ones(1, len(ties), 1, dtype=dtype)
    rounded = causal_conv1d_native.forward(ones, ties.view(-1, 1), None, False).flatten()
    assert torch.equal(rounded, ties.to(dtype))


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels_per_group=st.integers(1, 35),
    length=st.integers(1, 135),
    states=st.sampled_from([1, 2, 3, 4, 8, 16, 17, 64]),
    groups=st.integers(1, 3),
    layout=st.sampled_from(LAYOUTS),
    isa=st.sampled_from(native_library.instruction_sets() or ["none"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    workers=st.integers(1, 5),
)
def test_any_shape(
    batch: int,
    channels_per_group: int,
    length: int,
    states: int,
    groups: int,
    layout: str,
    isa: str,
    dtype: torch.dtype,
    workers: int,
) -> None:
    before = torch.get_num_threads()
    native_library.use_instruction_set(isa)
    torch.set_num_threads(workers)
    try:
        shape = (batch, channels_per_group * groups, length)
        arguments, grad_out, grad_last = make(shape, states, groups, layout=layout, dtype=dtype)
        check_scan(arguments, grad_out, grad_last, True)
    finally:
        torch.set_num_threads(before)
        native_library.use_instruction_set(native_library.instruction_sets()[0])


def test_256_states() -> None:
    arguments, grad_out, grad_last = make((1, 9, 66), 256)
    check_scan(arguments, grad_out, grad_last, True)


def test_mixed_layouts_and_views() -> None:
    """As networks make them: u and z halves of one projection, B and C slices of another, an expanded gradient."""
    both = torch.randn(2, 70, 48)  # (B, L, 2 D)
    u, z = (x.transpose(1, 2) for x in both.chunk(2, -1))
    projected = torch.randn(2, 70, 3 + 2 * 16)
    B, C = (projected[..., start : start + 16].transpose(1, 2).unsqueeze(1) for start in (3, 19))
    delta = torch.randn(2, 24, 70)
    arguments: Arguments = [u, delta, -torch.rand(24, 16), B, C, torch.randn(24), z, torch.randn(24) - 1, None]
    check_scan(arguments, torch.ones(1, 1, 1).expand(2, 24, 70), None, True)


def test_output_keeps_the_memory_layout() -> None:
    for layout in ("channels last", "tokens last"):
        arguments, grad_out, _ = make((2, 8, 10), 4, layout=layout)
        call: list[Any] = arguments
        out, _, states = native.forward(record(call, True), True)
        assert out.stride() == call[0].stride()
        gradients = native.backward(record(call, True), (grad_out, None), states)
        for argument, gradient in zip(call, gradients, strict=True):
            assert gradient is not None
            assert gradient.stride() == torch.empty_like(argument).stride()


def test_alignment_is_not_assumed() -> None:
    arguments, grad_out, _ = make((1, 16, 70), 16)
    shifted: Arguments = []
    for x in arguments:
        assert x is not None
        dense = x.transpose(-1, -2).contiguous() if x.dim() > 2 else x.contiguous()
        memory = torch.empty(dense.numel() + 1)[1:].copy_(dense.flatten())  # 4 bytes off any boundary
        view = memory.view_as(dense)
        shifted.append(view.transpose(-1, -2) if x.dim() > 2 else view)
    check_scan(shifted, grad_out, None, True)


# ---- Long sequences ----


@pytest.mark.parametrize("decay", [1.0, 0.02])
def test_errors_do_not_grow_with_length(decay: float) -> None:
    """With a decay of 0.02 a state lives for thousands of tokens, and every error with it."""
    arguments, grad_out, grad_last = make((1, 16, 8192), 16, without=("z",))
    call: list[Any] = arguments
    call[1] -= 2
    call[2] *= decay
    exact: list[Any] = [None if x is None else x.double() for x in call]
    out, _, states = native.forward(record(call, True), True)
    expected, _, expected_states = native.forward(record(exact, True), True)
    assert error(out, expected) < 1e-6
    gradients = native.backward(record(call, True), (grad_out, grad_last), states)
    expected_gradients = native.backward(record(exact, True), (grad_out.double(), grad_last.double()), expected_states)
    for name, x, y in zip(NAMES, gradients, expected_gradients, strict=True):
        if x is not None and y is not None:
            assert error(x, y) < 4e-6, name


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize(("shape", "workers"), [((1, 5, 3000), 7), ((2, 1, 2001), 8), ((1, 40, 2000), 30)])
def test_tokens_are_shared_out_where_channels_are_few(
    threads: Callable[[int], None], poisoned: None, shape: tuple[int, int, int], workers: int, gate: bool
) -> None:
    arguments, grad_out, grad_last = make(shape, 16, dtype=torch.float64, without=() if gate else ("z",))
    call: list[Any] = arguments
    threads(1)
    out, last, states = native.forward(record(call, True), True)
    alone = (out, last, states, *native.backward(record(call, True), (grad_out, grad_last), states))
    threads(workers)
    out, last, states = native.forward(record(call, True), True)
    shared = (out, last, states, *native.backward(record(call, True), (grad_out, grad_last), states))
    for x, y in zip(shared, alone, strict=True):
        if x is not None and y is not None:
            assert error(x, y) < 1e-12


# ---- Extreme numbers ----


def test_extreme_steps_and_decays(instruction_set: str) -> None:
    arguments, grad_out, _ = make((1, 16, 70), 4, without=("z",))
    call: list[Any] = arguments
    call[1][:, :, ::3] = 300.0
    call[1][:, :, 1::3] = -300.0
    call[2][:, 0] = -1e6
    call[2][:, 1] = -1e-12
    call[2][:, 2] = 0.0
    check_scan(arguments, grad_out, None, True)


def test_growing_states_overflow_to_infinity(instruction_set: str) -> None:
    one = torch.ones(1, 1, 4)
    for steps in ([1.0, 80.0, 80.0, 1.0], [1.0, 100.0, 1.0, 1.0]):  # within the range of exp, and beyond it
        delta = torch.tensor(steps).view(1, 1, 4)
        arguments = (one, delta, torch.ones(1, 1), one[None], one[None], None, None, None)
        out, last, _ = native.forward(record(arguments, False), False)
        assert out[0, 0, 0] == 1
        assert out[0, 0, -1] == last.item() == math.inf


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_nan_comes_out_where_it_must(instruction_set: str, name: str) -> None:
    arguments, grad_out, _ = make((1, 16, 70), 4)
    call: list[Any] = arguments
    poison = call[NAMES.index(name)]
    poison[(0, 3, 10) if name in ("u", "delta", "z") else (0, 0, 1, 10) if name in ("B", "C") else 3] = math.nan
    out, _, states = native.forward(record(call, True), True)
    exact: list[Any] = [None if x is None else x.double() for x in call]
    expected = textbook(*exact, True)[0]
    assert torch.equal(out.isnan(), expected.isnan())
    gradients = native.backward(record(call, True), (grad_out, None), states)
    assert any(x is not None and x.isnan().any() for x in gradients)


# ---- Directions ----


def check_directional(u: Tensor, arguments: list[Tensor | None], grad: Tensor, order: Tensor, softplus: bool) -> None:
    """``arguments`` as those of a scan from delta on, without a gate."""
    exact: list[Any] = doubled([u, *arguments])
    total: Any = 0
    last_states = []
    for k, index in enumerate(order.long()):
        v, d, a, b, c, skip, bias, initial = (
            None if x is None else x if i == 0 else x[k] if i in (2, 5, 6) else x[:, k] for i, x in enumerate(exact)
        )
        inputs = (b[:, None, :, index], c[:, None, :, index])
        y, last, _ = textbook(v[..., index], d[..., index], a, *inputs, skip, None, bias, initial, softplus)
        total = total + torch.empty_like(y).index_copy(-1, index, y)
        last_states.append(last)
    last = torch.stack(last_states, 1)
    grad_last = torch.randn(last.shape, dtype=native_dtype(u))
    loss = (total * grad.double()).sum() + (last * grad_last.double()).sum()
    expected = torch.autograd.grad(loss, [x for x in exact if x is not None])

    *most, bias, initial = [u, *arguments]
    scan = record([*most, None, bias, initial], softplus, order)
    scan.check()
    y, last_state, states = native.forward(scan, True)
    assert y.stride() == torch.empty_like(u).stride()
    assert error(y, total.detach()) < TOLERANCE[u.dtype]
    assert error(last_state, last.detach()) < min(TOLERANCE[u.dtype], TOLERANCE[torch.float32])
    gradients = native.backward(scan, (grad, grad_last), states)
    given = [x for x in gradients if x is not None]
    for x, z in zip(given, expected, strict=True):
        assert error(x, z) < TOLERANCE[u.dtype]


def native_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directional_scan_is_the_sum_of_permuted_scans(
    instruction_set: str, poisoned: None, layout: str, dtype: torch.dtype, options: bool
) -> None:
    batch, channels, states, size = 2, 21, 5, (7, 11)
    order = scan_order(size).to(torch.int32)
    directions, length = order.shape
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    u, grad = (laid_out(torch.randn(batch, channels, length, dtype=dtype), layout) for _ in range(2))
    arguments: list[Tensor | None] = [
        laid_out(torch.randn(batch, directions, channels, length, dtype=dtype).abs() / 2, layout),
        -torch.rand(directions, channels, states, dtype=compute),
        laid_out(torch.randn(batch, directions, states, length, dtype=dtype), layout),
        laid_out(torch.randn(batch, directions, states, length, dtype=dtype), layout),
        torch.randn(directions, channels, dtype=compute) if options else None,
        torch.randn(directions, channels, dtype=compute) - 1 if options else None,
        torch.randn(batch, directions, channels, states, dtype=compute) if options else None,
    ]
    check_directional(u, arguments, grad, order, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_directions_are_summed_before_they_are_rounded(instruction_set: str, dtype: torch.dtype, layout: str) -> None:
    """Outputs and gradients of 16 directions that cancel out but for the last bits of one."""
    length, channels, directions = 70, 20, 16
    u = laid_out((torch.randint(1, 120, (1, channels, length)) / 64).to(dtype), layout)
    order = torch.arange(length, dtype=torch.int32).repeat(directions, 1)
    delta = torch.full((1, directions, channels, length), -1e4, dtype=dtype)  # steps of zero: D u is all there is
    B = torch.ones(1, directions, 1, length, dtype=dtype)
    D = torch.tensor([1000.0, -1000.0]).repeat(directions // 2)[:, None].repeat(1, channels)
    D[0] += 1
    scan = record([u, delta, -torch.ones(directions, channels, 1), B, B, D], True, order)
    out, _, states = native.forward(scan, True)
    assert torch.equal(out, u)
    assert torch.equal(native.backward(scan, (u, None), states)[0], u)


def test_many_directions_on_many_threads(threads: Callable[[int], None], poisoned: None) -> None:
    length, directions = 600, 6
    order = torch.stack([torch.randperm(length) for _ in range(directions)]).to(torch.int32)
    u, grad = torch.randn(1, 4, length).double(), torch.randn(1, 4, length).double()
    shape = (1, directions, 4, length)
    arguments: list[Tensor | None] = [
        torch.rand(shape).double(),
        -torch.rand(directions, 4, 3).double(),
        torch.randn(1, directions, 3, length).double(),
        torch.randn(1, directions, 3, length).double(),
        None,
        None,
        torch.randn(1, directions, 4, 3).double(),
    ]
    threads(6)
    check_directional(u, arguments, grad, order, True)


# ---- Causal convolution ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("length", "width"), [(200, 4), (64, 1), (2, 4), (70, 65), (129, 3)])
def test_causal_convolution(
    instruction_set: str,
    poisoned: None,
    threads: Callable[[int], None],
    layout: str,
    silu: bool,
    bias: bool,
    length: int,
    width: int,
) -> None:
    threads(3)
    x, grad = (laid_out(torch.randn(2, 37, length), layout) for _ in range(2))
    weight, shift = torch.randn(37, width), torch.randn(37) if bias else None
    exact: list[Any] = doubled([x, weight, shift])
    y = F.conv1d(F.pad(exact[0], (width - 1, 0)), exact[1][:, None], exact[2], groups=37)
    y = F.silu(y) if silu else y
    expected = torch.autograd.grad((y * grad.double()).sum(), [v for v in exact if v is not None])
    out = causal_conv1d_native.forward(x, weight, shift, silu)
    assert out.stride() == torch.empty_like(x).stride()
    assert error(out, y.detach()) < 1e-6
    gradients = causal_conv1d_native.backward(grad, x, weight, shift, silu)
    assert (gradients[2] is None) == (not bias)
    for gradient, wanted in zip([g for g in gradients if g is not None], expected, strict=True):
        assert error(gradient, wanted) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_causal_convolution_in_other_dtypes(dtype: torch.dtype) -> None:
    x, weight, shift = torch.randn(2, 5, 30).to(dtype), torch.randn(5, 4).to(dtype), torch.randn(5).to(dtype)
    exact: list[Any] = doubled([x, weight, shift])
    y = F.silu(F.conv1d(F.pad(exact[0], (3, 0)), exact[1][:, None], exact[2], groups=5))
    grad = torch.randn(2, 5, 30).to(dtype)
    expected = torch.autograd.grad((y * grad.double()).sum(), exact)
    assert error(causal_conv1d_native.forward(x, weight, shift, True), y.detach()) < TOLERANCE[dtype]
    for gradient, wanted in zip(causal_conv1d_native.backward(grad, x, weight, shift, True), expected, strict=True):
        assert gradient is not None
        assert gradient.dtype == dtype
        assert error(gradient, wanted) < TOLERANCE[dtype]


# ---- What must not reach C ----


def arguments_of_a_scan() -> dict[str, Any]:
    return dict(zip(NAMES, make((2, 6, 10), 4)[0], strict=True))


def call(scan: Scan) -> None:
    with use_backend("native"):
        torch.ops.nnunetv2_lightnets.selective_scan(*operator_arguments(scan), False, False)


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("u", torch.randn(6, 10), "u has shape"),
        ("delta", torch.randn(2, 6, 9), "delta has shape"),
        ("A", torch.randn(5, 4), "A has shape"),
        ("A", torch.randn(6, 0), "A has shape"),
        ("B", torch.randn(2, 1, 5, 10), "B has shape"),
        ("B", torch.randn(2, 4, 10), "B has shape"),
        ("C", torch.randn(2, 2, 4, 10), "C has shape"),
        ("D", torch.randn(7), "D has shape"),
        ("z", torch.randn(1, 6, 10), "z has shape"),
        ("delta_bias", torch.randn(6, 1), "delta_bias has shape"),
        ("initial_state", torch.randn(2, 6, 5), "initial_state has shape"),
        ("u", torch.zeros(2, 6, 10, dtype=torch.int64), "u in torch.int64"),
        ("A", torch.zeros(6, 4, dtype=torch.complex64), "torch.complex64"),
        ("u", torch.zeros(2, 6, 10, device="meta"), "on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name: str, bad: Tensor, words: str) -> None:
    """By the operator, whatever the backend: it checks what backends rely on."""
    scan = Scan(**arguments_of_a_scan())
    assert native.refuses(scan) is None
    call(scan)
    scan = replace(scan, **{name: bad})
    with pytest.raises(LightNetsError, match=words):
        scan.check()
    if not bad.is_meta:  # torch itself computes with the fake kernel there
        with pytest.raises(LightNetsError, match=words):
            call(scan)


def test_groups_must_divide_the_channels() -> None:
    arguments = arguments_of_a_scan()
    arguments["B"] = arguments["C"] = torch.randn(2, 4, 4, 10)
    with pytest.raises(LightNetsError, match="B has 4 groups for 6 channels"):
        call(Scan(**arguments))


def test_tensors_that_are_not_dense_are_refused() -> None:
    scan = Scan(**arguments_of_a_scan())
    assert native.refuses(replace(scan, A=scan.A.to_sparse())) == "A is torch.sparse_coo, and it reads dense tensors"
    assert (
        native.refuses(replace(scan, u=scan.u.int()))
        == "u is torch.int32, and it reads float32, float64, bfloat16 and float16"
    )
    assert native.refuses(replace(scan, u=scan.u.to("meta"))) == "u is on meta, and it computes on CPUs"


def test_backward_checks_what_it_is_given() -> None:
    scan = Scan(**arguments_of_a_scan())
    states = native.forward(scan, True)[2]
    grad, native_again = torch.randn(2, 6, 10), torch.tensor(BACKENDS.index("native"))
    for bad_grad, bad_last, bad_states in (
        (grad[:, :5], None, states),
        (grad, torch.randn(2, 6, 3), states),
        (grad, None, states[1:]),
        (grad, None, states.double()),
        (grad.double(), None, states),
    ):
        with pytest.raises(LightNetsError, match=r"gradient|backward"):
            torch.ops.nnunetv2_lightnets.selective_scan_backward(
                bad_grad, bad_last, *operator_arguments(scan), bad_states, native_again
            )


def test_nothing_to_do() -> None:
    arguments, grad_out, _ = make((0, 6, 10), 4)
    call: list[Any] = arguments
    out, last, states = native.forward(record(call, True), True)
    assert (out.shape, last.shape, states.numel()) == ((0, 6, 10), (0, 6, 4), 0)
    gradients = native.backward(record(call, True), (grad_out, None), states)
    for x, name in zip(gradients, NAMES, strict=True):
        assert x is not None
        assert x.numel() == 0 or (x == 0).all(), name


def test_lazy_negation_is_seen() -> None:
    arguments, _, _ = make((1, 6, 10), 4)
    call: list[Any] = arguments
    expected = native.forward(record(call, True), False)[0]
    call[0] = torch._neg_view(-call[0])
    assert call[0].is_neg()
    assert torch.equal(native.forward(record(call, True), False)[0], expected)


class _OtherLibrary:
    """A library as ctypes shows it, which was built from other sources."""

    def __init__(self, numbers: list[int] | None) -> None:
        if numbers is not None:
            self.ln_abi = lambda found, count: found.__setitem__(slice(0, count), numbers)


@pytest.mark.parametrize("change", ["older", "size", "interface"])
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """It would take the arguments for others: an editable install keeps the old one when sources change."""
    structs = tuple(getattr(native_library, f"{name}Struct") for name in ("Tensor", "Scan", "Conv", "Mamba"))
    numbers = [native_library.ABI, *map(ctypes.sizeof, structs), 64]
    if change == "size":
        numbers[2] -= 8
    if change == "interface":
        numbers[0] -= 1
    other = _OtherLibrary(None if change == "older" else numbers)
    monkeypatch.setattr(native_library.ctypes, "CDLL", lambda *_: other)
    native_library._load.cache_clear()
    try:
        reason = native.unavailable()
        assert reason is not None and "another version" in reason and "pip install -e ." in reason
        with use_backend("native"), pytest.raises(LightNetsError, match="another version"):
            call(Scan(**arguments_of_a_scan()))
    finally:
        monkeypatch.undo()
        native_library._load.cache_clear()
    assert native.unavailable() is None


def test_a_forced_instruction_set_that_is_missing_is_named() -> None:
    code = "from nnunetv2_lightnets.ops.selective_scan import native; print(native.unavailable())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, native_library.INSTRUCTION_SET_VARIABLE: "mmx"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'mmx'" in done.stdout and "baseline" in done.stdout
    with pytest.raises(LightNetsError, match="mmx"):
        native_library.use_instruction_set("mmx")


def test_instruction_sets_agree() -> None:
    arguments, _, _ = make((1, 33, 100), 16)
    call: list[Any] = arguments
    outputs = []
    for name in native_library.instruction_sets():
        native_library.use_instruction_set(name)
        outputs.append(native.forward(record(call, True), False)[0])
    native_library.use_instruction_set(native_library.instruction_sets()[0])
    for out in outputs[1:]:
        assert error(out, outputs[0].double()) < 1e-6


# ---- Threads and processes ----


def work(seed: int) -> tuple[Any, ...]:
    """A scan large enough to be worth several threads, and its gradients."""
    generator = torch.Generator().manual_seed(seed)
    u, delta, grad = (torch.randn(1, 64, 4096, generator=generator) for _ in range(3))
    A, B, C = -torch.rand(64, 16, generator=generator), *(torch.randn(2, 1, 1, 16, 4096, generator=generator))
    scan = Scan(u, delta, A, B, C, delta_softplus=True)
    out, _, states = native.forward(scan, True)
    gradients = native.backward(scan, (grad, None), states)
    return out, *(x for x in gradients if x is not None)


def same(x: tuple[Any, ...], y: tuple[Any, ...]) -> bool:
    return all(error(a, b.double()) < 1e-5 for a, b in zip(x, y, strict=True))


def test_threads_of_python_scan_at_once(threads: Callable[[int], None]) -> None:
    threads(2)
    expected = [work(seed) for seed in range(3)]
    results: dict[int, list[bool]] = {}

    def repeat(seed: int) -> None:
        torch.set_num_threads(2)
        results[seed] = [same(work(seed), expected[seed]) for _ in range(4)]

    workers = [threading.Thread(target=repeat, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert results == {seed: [True] * 4 for seed in range(3)}


def test_the_interpreter_runs_on_during_a_scan(threads: Callable[[int], None]) -> None:
    threads(1)
    ticks = 0
    done = threading.Event()

    def scan() -> None:
        for _ in range(5):
            work(0)
        done.set()

    worker = threading.Thread(target=scan)
    worker.start()
    while not done.wait(0.0005):
        ticks += 1
    worker.join()
    assert ticks > 10


def _in_child(queue: Any, workers: int) -> None:
    torch.set_num_threads(workers)
    out = work(1)[0]
    torch.set_num_threads(1)  # for the sum: torch's own loops wait for ever for threads that did not survive the fork
    queue.put(out.double().sum().item())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_forked_child_can_scan(threads: Callable[[int], None], workers: int) -> None:
    """As workers of a data loader do, after the parent has used torch's threads and ours."""
    threads(2)
    torch.randn(1000, 1000) @ torch.randn(1000, 1000)
    expected = work(1)[0].double().sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, workers))
    child.start()
    try:
        assert queue.get(timeout=60) == pytest.approx(expected, rel=1e-3, abs=1e-2)
    finally:
        child.join(5)
        child.kill()
    work(1)  # and the parent goes on


def test_one_thread_is_one_thread(threads: Callable[[int], None]) -> None:
    """Workers of a data loader set the number of threads to one; nothing else may be woken then."""
    code = """
import os, torch
torch.set_num_threads(1)
from nnunetv2_lightnets.ops.selective_scan import native
from nnunetv2_lightnets.ops.selective_scan.record import Scan
before = len(os.listdir("/proc/self/task"))
u = torch.randn(1, 64, 8192)
B = torch.randn(1, 1, 16, 8192)
native.forward(Scan(u, u, -torch.rand(64, 16), B, B, delta_softplus=True), True)
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_a_training_step_needs_little_memory() -> None:
    """At most twice the inputs and outputs, where all states together would take ten times as much."""
    code = """
import resource, torch
torch.set_num_threads(2)
from nnunetv2_lightnets.ops.selective_scan import native
from nnunetv2_lightnets.ops.selective_scan.record import Scan
D, L, N = 64, 65536, 16
u, delta, grad = (torch.randn(1, L, D).transpose(1, 2) for _ in range(3))
B, C = (torch.randn(1, 1, L, N).transpose(2, 3) for _ in range(2))
A = -torch.rand(D, N)
small = [x[..., :64] for x in (u, delta, B, C, grad)]
scan = Scan(small[0], small[1], A, small[2], small[3], delta_softplus=True)
native.backward(scan, (small[4], None), native.forward(scan, True)[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scan = Scan(u, delta, A, B, C, delta_softplus=True)
out, _, states = native.forward(scan, True)
native.backward(scan, (grad, None), states)
extra = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
inputs_and_outputs = sum(x.nbytes for x in (u, delta, B, C, out))
print(extra / inputs_and_outputs, 4 * D * L * N / inputs_and_outputs)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    extra, all_states = map(float, done.stdout.split())
    assert all_states > 4
    assert extra < 2.0
