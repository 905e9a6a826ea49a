"""Runs Triton in a process of its own, one JSON request per line: test_triton_values.py and test_triton_compile.py.

Whether kernels are compiled or interpreted (TRITON_INTERPRET) is settled when Triton is imported, and other tests
import it, too: hence the process. A request names a function below and its arguments; the answer is its result.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nnunetv2_lightnets.ops import triton_runtime
from nnunetv2_lightnets.ops.selective_scan import probe, reference, triton_scan
from nnunetv2_lightnets.ops.selective_scan.record import Scan

torch.set_num_threads(1)
TABLES = {"forward": triton_scan.FORWARD, "backward": triton_scan.BACKWARD}
SMALL_SCAN = probe.small_scan
GRADIENTS = ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias", "dinitial_state")


# --------------------------------------------------------------------------------------------------- inputs of a scan


def _tokens(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str) -> Tensor:
    """Random (..., rows, L) whose rows are neighbours in memory ("channels"), or whose tokens are ("tokens").

    "slices": rows are neighbours, but tokens are further apart than rows, and every image starts a row later.
    """
    *outer, rows, length = shape
    if layout == "tokens":
        return torch.randn(shape, dtype=dtype, device=device)
    wider = rows + 3 if layout == "slices" else rows
    wide = torch.randn((*outer, length, wider), dtype=dtype, device=device)
    return wide[..., wider - rows :].transpose(-1, -2)


def plain_scan(
    batch: int,
    channels: int,
    length: int,
    states: int,
    *,
    groups: int = 1,
    dtype: str = "float64",
    layout: str = "channels",
    D: bool = True,
    z: bool = True,
    bias: bool = True,
    softplus: bool = True,
    initial: bool = False,
    apart: bool = False,
    rank: int | None = None,
    device: str = "cpu",
) -> Scan:
    """A random plain scan.

    ``apart``: B and C have other strides than each other; ``rank``: they lie behind so many numbers in one row.
    """
    kind = getattr(torch, dtype)
    compute = torch.float64 if kind == torch.float64 else torch.float32
    u, delta, gate = (_tokens((batch, channels, length), kind, layout, device) for _ in range(3))
    B, C = (_tokens((batch, groups, states, length), kind, layout, device) for _ in range(2))
    if rank is not None:
        rows = torch.randn(batch, groups, length, rank + 2 * states, dtype=kind, device=device)
        B, C = rows[..., rank : rank + states].mT, rows[..., rank + states :].mT
    if apart:
        C = C.contiguous()
    A = -2 * torch.rand(channels, states, dtype=compute, device=device)
    skip, delta_bias = torch.randn(2, channels, dtype=compute, device=device)
    if not softplus:
        delta = delta.abs()  # scans grow without bounds where step sizes are negative
        delta_bias = delta_bias.abs()
    options = (skip if D else None, gate if z else None, delta_bias if bias else None)
    initial_state = torch.randn(batch, channels, states, dtype=compute, device=device) if initial else None
    return Scan(u, delta, A, B, C, *options, initial_state, None, softplus)


def directional(
    batch: int,
    channels: int,
    length: int,
    states: int,
    *,
    directions: int = 2,
    dtype: str = "float64",
    layout: str = "channels",
    D: bool = True,
    bias: bool = True,
    softplus: bool = True,
    initial: bool = False,
) -> Scan:
    """A random directional scan."""
    kind = getattr(torch, dtype)
    compute = torch.float64 if kind == torch.float64 else torch.float32
    u = _tokens((batch, channels, length), kind, layout, "cpu")
    delta = _tokens((batch, directions, channels, length), kind, layout, "cpu")
    B, C = (_tokens((batch, directions, states, length), kind, layout, "cpu") for _ in range(2))
    A = -2 * torch.rand(directions, channels, states, dtype=compute)
    skip, delta_bias = torch.randn(2, directions, channels, dtype=compute)
    order = torch.stack([torch.randperm(length, dtype=torch.int32) for _ in range(directions)])
    initial_state = torch.randn(batch, directions, channels, states, dtype=compute) if initial else None
    options = (skip if D else None, None, delta_bias if bias else None)
    return Scan(u, delta, A, B, C, *options, initial_state, order, softplus)


# ------------------------------------------------------------------------------------------------- interpreted kernels


def _error(found: Tensor, wanted: Tensor) -> float:
    """Largest error, relative to the largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))


def _changed(scan: Scan, change: Callable[[str, Tensor], Tensor]) -> Scan:
    """The scan with all its tensors changed."""
    tensors = {field.name: getattr(scan, field.name) for field in fields(scan)}
    return replace(scan, **{name: change(name, x) for name, x in tensors.items() if isinstance(x, Tensor)})


def _double(scan: Scan) -> Scan:
    return _changed(scan, lambda _, x: x.double() if x.is_floating_point() else x)


def _settings(programs: int, run: int, candidate: int = 0) -> None:
    """How many programs to cut a scan into, how many segments pass 2 takes at once, and which tiles are taken."""
    triton_scan.FORWARD, triton_scan.BACKWARD = (
        (replace(table[candidate], programs=programs),) for table in (TABLES["forward"], TABLES["backward"])
    )
    triton_scan._RUN = run


def scan_errors(
    kind: str, *, programs: int = 16, run: int = 32, candidate: int = 0, last_state: bool = True, **case: Any
) -> dict[str, float]:
    """Errors of all results against the reference in float64; checks dtypes and layouts on the way."""
    _settings(programs, run, candidate)
    torch.manual_seed(0)
    scan = plain_scan(**case) if kind == "plain" else directional(**case)
    scan.check()
    wanted = reference.forward(_double(scan), True)
    found = triton_scan.forward(scan, True)
    assert found[0].dtype == scan.u.dtype and found[0].stride() == torch.empty_like(scan.u).stride()
    errors = {name: _error(x, y) for name, x, y in zip(("out", "last_state", "states"), found, wanted, strict=True)}
    unsaved = triton_scan.forward(scan, False)
    assert torch.equal(unsaved[0], found[0]) and torch.equal(unsaved[1], found[1]) and unsaved[2].numel() == 0

    grad_out = _tokens(tuple(scan.u.shape), scan.u.dtype, "tokens" if kind == "plain" else "channels", "cpu")
    grad_last = torch.randn_like(found[1]) if last_state else None
    incoming = (grad_out.double(), grad_last if grad_last is None else grad_last.double())
    wanted_gradients = reference.backward(_double(scan), incoming, wanted[2])
    gradients = triton_scan.backward(scan, (grad_out, grad_last), found[2])
    for name, x, y, argument in zip(GRADIENTS, gradients, wanted_gradients, scan.tensors(), strict=True):
        assert (x is None) == (argument is None), name
        if x is not None and y is not None and argument is not None:
            assert x.dtype == argument.dtype and x.shape == argument.shape, name
            assert x.stride() == torch.empty_like(argument).stride(), name
            errors[name] = _error(x, y)
    return errors


def cut_errors(cut: int, *, programs: int = 16, **case: Any) -> dict[str, float]:
    """Errors of all results of two parts, the second of which goes on from the last state of the first, against one."""
    _settings(programs, 32)
    torch.manual_seed(0)
    scan = plain_scan(**case, initial=True)

    def part(tokens: slice, state: Tensor) -> Scan:
        in_tokens = ("u", "delta", "B", "C", "z")
        return replace(_changed(scan, lambda name, x: x[..., tokens] if name in in_tokens else x), initial_state=state)

    assert scan.initial_state is not None
    out, last_state, states = triton_scan.forward(scan, True)
    grad_out, grad_last = torch.randn_like(out), torch.randn_like(last_state)
    wanted = triton_scan.backward(scan, (grad_out, grad_last), states)
    first = part(slice(cut), scan.initial_state)
    first_out, state, first_states = triton_scan.forward(first, True)
    second = part(slice(cut, None), state)
    second_out, second_last, second_states = triton_scan.forward(second, True)
    *later, carried = triton_scan.backward(second, (grad_out[..., cut:], grad_last), second_states)
    earlier = triton_scan.backward(first, (grad_out[..., :cut], carried), first_states)
    errors = {"out": _error(torch.cat((first_out, second_out), -1), out), "last": _error(second_last, last_state)}
    for name, x, y, whole in zip(GRADIENTS, earlier, [*later, None], wanted, strict=True):
        if x is None or whole is None:
            continue
        if name in ("du", "ddelta", "dB", "dC", "dz"):
            x = torch.cat((x, y), -1)
        elif y is not None:  # all but the initial state's
            x = x + y
        errors[name] = _error(x, whole)
    return errors


def wide_stride_errors() -> dict[str, float]:
    """Errors where the states of B and C are so far apart in memory that n times their stride exceeds 32 bits."""
    _settings(16, 32)
    torch.manual_seed(0)
    scan = plain_scan(1, 2, 3, 3, dtype="float32", groups=1)
    stride = 2**30 + 8
    memory = torch.empty(2 * stride + 3, dtype=torch.float32)  # 8 GiB of addresses, of which three pages are touched
    apart = torch.as_strided(memory, (1, 1, 3, 3), (0, 0, stride, 1)).copy_(scan.B)
    found = replace(scan, B=apart, C=apart)
    near = replace(scan, C=scan.B)
    grad = torch.randn_like(scan.u)
    states = triton_scan.forward(found, True)[2]
    wanted = reference.backward(_double(near), (grad.double(), None), states)
    gradients = triton_scan.backward(found, (grad, None), states)
    return {name: _error(x, y) for name, x, y in zip(GRADIENTS, gradients, wanted, strict=True) if x is not None}


def start_errors(segments: int, reverse: bool, given: bool) -> float:
    """Error of pass 2 alone, over more segments than a tiny scan has, against the recurrence written out."""
    _settings(16, 32)
    torch.manual_seed(0)
    plain = plain_scan(2, 3, 1, 5)
    scan = triton_scan._Prepared(plain)
    ends, dt_sums = torch.randn(2, segments, 5, 3).double(), torch.rand(2, segments, 3).double()
    first = torch.randn(2, 1, 5, 3).double() if given else None
    found = triton_scan._starts(scan, triton_scan.FORWARD[0], ends, dt_sums, first, reverse)
    state = torch.zeros(2, 5, 3).double() if first is None else first[:, 0]
    wanted = torch.empty_like(ends)
    for segment in reversed(range(segments)) if reverse else range(segments):
        wanted[:, segment] = state
        state = torch.exp(plain.A.T * dt_sums[:, segment, None]) * state + ends[:, segment]
    return _error(found, wanted)


def softplus_errors(inputs: list[float]) -> dict[str, list[float]]:
    """Relative errors of the kernels' softplus, found from the state after one token of u = 1, B = 1."""
    errors = {}
    for dtype in (torch.float32, torch.float64):
        delta = torch.tensor(inputs, dtype=dtype).view(1, -1, 1)
        A, B = torch.full((len(inputs), 1), -1.0, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)
        _, state, _ = triton_scan.forward(Scan(torch.ones_like(delta), delta, A, B, B, delta_softplus=True), False)
        wanted = torch.nn.functional.softplus(delta.double()).flatten()
        errors[str(dtype).removeprefix("torch.")] = ((state.flatten().double() - wanted) / wanted).abs().tolist()
    return errors


def public_error() -> float:
    """Largest error of a value or gradient of the public function when the backend is forced."""
    from nnunetv2_lightnets.ops import selective_scan, use_backend

    _settings(16, 32)
    torch.manual_seed(0)
    scan = plain_scan(1, 3, 5, 4, initial=True)
    results = []
    for name in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in scan.tensors() if x is not None]
        with use_backend(name):
            out, last = selective_scan(*leaves[:-1], True, True, leaves[-1])
            gradients = torch.autograd.grad(out.sin().sum() + last.cos().sum(), leaves)
        results.append((out, last, *gradients))
    return max(_error(found, wanted) for found, wanted in zip(*results, strict=True))


def probe_fault(kind: str) -> str | None:
    """What the probe says of the kernels."""
    probe.small_scan = lambda *x: SMALL_SCAN(*x, channels=3, length=66)
    _settings(16, 32)
    return probe.fault("triton", kind, triton_scan.forward, triton_scan.backward, torch.device("cpu"))


def availability() -> dict[str, Any]:
    """What the backend says of this process, with and without the interpreter."""
    scan = plain_scan(1, 2, 3, 4, softplus=True, dtype="float32")
    wide = plain_scan(1, 2, 3, 300, dtype="float32")
    integers = replace(scan, u=scan.u.int())
    elsewhere = _changed(scan, lambda _, x: x.to("meta"))
    return {
        "imported": "triton" in sys.modules,
        "unavailable": triton_scan.unavailable(),
        "refuses": [triton_scan.refuses(x) for x in (scan, wide, integers, elsewhere)],
    }


# ---------------------------------------------------------------------------------------------------- compiled kernels


def resources(
    kind: str,
    capabilities: list[int],
    candidate: int = 0,
    multiprocessors: int = 108,
    backward: bool = True,
    **case: Any,
) -> list[dict[str, Any]]:
    """Compile every kernel that a scan of this shape launches; return what each one uses on each GPU.

    The scan runs on tensors without memory, up to the launches, which are compiled instead: what is compiled here is
    what a GPU with 108 multiprocessors would be given.
    """
    launches: list[tuple[Any, dict[str, Any]]] = []
    triton_runtime.launch = lambda kernel, programs, arguments: launches.append((kernel, arguments))
    triton_runtime.multiprocessors = lambda device: 108
    scan = plain_scan(**case, device="meta") if kind == "plain" else _meta_directional(**case)
    tiles = TABLES["forward"][candidate], TABLES["backward"][candidate]
    out, last, states = triton_scan.forward(scan, True, tiles[0])
    if backward:
        triton_scan.backward(scan, (out, last if kind == "plain" else None), states, tiles[1])
    return compiled(_once(launches), capabilities)


def _meta_directional(**case: Any) -> Scan:
    """Without a real permutation of all the tokens, which takes long."""
    scan = directional(**{**case, "length": 1})
    long = ("u", "delta", "B", "C", "order")

    def longer(name: str, x: Tensor) -> Tensor:
        if name not in long:
            return x.to("meta")
        return _tokens((*x.shape[:-1], case["length"]), torch.float32, case.get("layout", "channels"), "meta").to(
            x.dtype
        )

    return _changed(scan, longer)


def _once(launches: list[tuple[Any, dict[str, Any]]]) -> list[tuple[Any, dict[str, Any]]]:
    """Launches that differ in what is compiled."""
    return list({repr((kernel.__name__, _signature(kernel, x))): (kernel, x) for kernel, x in launches}.values())


def _signature(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and divisibilities, as the launcher of Triton would derive them from the arguments."""
    types = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
    types[torch.int32] = "i32"
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        aligned = False
        if isinstance(value, Tensor):
            signature[parameter.name] = f"*{types[value.dtype]}"
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def variants(stages: list[dict[str, Any]]) -> dict[str, int]:
    """How many times each kernel is compiled for scans of all stages of a network, as Triton's own launcher decides.

    The launcher runs as on a GPU, up to the compiler, which is left out: what it is asked for is counted.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    triton.runtime.driver.set_active(driver)
    triton_runtime.multiprocessors = lambda device: 108
    asked: dict[str, set[str]] = {}

    def compiled(kernel: Any, key: str, *arguments: Any, **more: Any) -> Any:
        asked.setdefault(kernel.__name__, set()).add(str(key))
        return SimpleNamespace(
            launch_metadata=lambda *_: None, run=lambda *_: None, function=None, packed_metadata=None
        )

    JITFunction._do_compile = compiled
    for stage in stages:
        scan = plain_scan(**stage)
        out, _, states = triton_scan.forward(scan, True)
        triton_scan.backward(scan, (torch.empty_like(out), None), states)
    return {name: len(keys) for name, keys in asked.items()}


_jobs: list[tuple[Any, dict[str, Any], int]] = []


def compiled(launches: list[tuple[Any, dict[str, Any]]], capabilities: list[int]) -> list[dict[str, Any]]:
    """What kernels use on each GPU; compiled by as many processes as there are cores."""
    _jobs[:] = [(*launch, capability) for capability in capabilities for launch in launches]
    with multiprocessing.get_context("fork").Pool() as pool:
        return pool.map(_compile_job, range(len(_jobs)), chunksize=1)


def _compile_job(job: int) -> dict[str, Any]:
    """The job of this number: kernels and tensors without memory reach other processes by forking alone."""
    kernel, arguments, capability = _jobs[job]
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _signature(kernel, arguments)
    source = ASTSource(kernel, signature, constants, attributes)
    options = {name: arguments[name] for name in ("num_warps", "maxnreg", "enable_fp_fusion") if name in arguments}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = Path(f"{job}.cubin")  # in the worker's own folder
    cubin.write_bytes(compiled.asm["cubin"])
    printed = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed)
    assert used, printed
    return {
        "kernel": kernel.__name__,
        "triton": triton.__version__,
        "capability": capability,
        "registers": int(used[1]),
        "stack": int(used[2]) + int(used[3]),
        "shared": compiled.metadata.shared,
    }


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(globals()[request.pop("function")](**request)), flush=True)
