"""Section b: is it fast? Operators beside other backends and the device's copy bandwidth.

``ms``: median of calls from Python; ``graph ms``: of replays of a CUDA graph of them, in which nothing waits for
Python. ``needed MB``: every tensor of tokens read or written once. ``%``: needed bytes by ``graph ms`` (``ms``, where
no graph could be made), relative to a copy of 1 GiB, whose read and written bytes count alike. Inputs that fit into
the cache take turns. ``extra MB``: what a call takes beside its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_sections.bench import Bench, Table, captured, copy_bandwidth, peak_memory, start_memory, timed, wait
from gpu_sections.operators import CHOSEN, Case, Convolution, Norm, Scan
from nnunetv2_lightnets.files import last_line
from nnunetv2_lightnets.networks.lightm_unet import NORM_GROUPS
from nnunetv2_lightnets.ops import use_backend

TABLE = Table(
    "speed.csv",
    ("operator", "case", "dtype", "pass", "way"),
    ("ms", "graph ms", "needed MB", "%", "goal %", "extra MB"),
)
FORWARD, BOTH = PASSES = ("forward", "forward+backward")
GOALS = {FORWARD: 50, BOTH: 35}  # % of copy bandwidth, on an H100, of the first two cases
TORCHS_OWN = "torch's own"
CASES: tuple[Case, ...] = (
    Scan(1, 64, 2_097_152),
    Scan(2, 768, 6_400, image=(80, 80)),
    Convolution(1, 64, 2_097_152),
    Norm(1, 32, 2_097_152),
    Scan(1, 64, 2_097_152, layout="columns"),
    Scan(1, 64, 262_144),
    Convolution(1, 64, 262_144),
    Norm(1, 32, 262_144),
    Scan(1, 64, 32_768),
    Convolution(1, 64, 32_768),
    Norm(1, 32, 32_768),
)
TOY_CASES: tuple[Case, ...] = (Scan(1, 4, 10), Scan(1, 4, 6, image=(2, 3)), Convolution(1, 8, 40), Norm(1, 8, 40))
_MOST_SETS = 16


def run(bench: Bench) -> None:
    """Time all, the ways that take seconds last."""
    bandwidth = copy_bandwidth(bench.device, bench.toy)
    cases = TOY_CASES if bench.toy else CASES
    for slow in (False, True):
        for case in cases:
            for dtype in ("float32",) if bench.toy else ("float32", "bfloat16"):
                for way in ways(case, bench.device):
                    if slow != (way in ("torch", "native", "reference")):
                        continue
                    for direction in PASSES:
                        names = (case.operator, str(case), dtype, direction, way)
                        compute = partial(measure, case, dtype, direction, way, bandwidth, bench)
                        bench.rows.measure(names, compute, 12 if slow else 6)


def ways(case: Case, device: torch.device) -> list[str]:
    """Backends, and torch's own functions for what they can compute."""
    return [*case.backends(device), *([] if isinstance(case, Scan) else [TORCHS_OWN])]


def torchs_own(case: Case, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The function from torch's own operations."""
    x, weight, bias = tensors
    if isinstance(case, Convolution):
        y = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[1])
        return (F.silu(y[..., : x.shape[2]]),)
    return (F.relu(F.group_norm(x.mT, NORM_GROUPS, weight, bias)).mT,)


def measure(case: Case, dtype: str, direction: str, way: str, bandwidth: float, bench: Bench) -> dict[str, Any]:
    """One row."""
    kind: torch.dtype = getattr(torch, dtype)
    device = bench.device
    needed = sum(case.needed_bytes(kind)[: 1 + (direction == BOTH)])
    inputs = case.inputs(kind, device, device)
    sets = [inputs, *([x.clone() for x in inputs] for _ in range(number_of_sets(inputs, device) - 1))]
    call = call_of(case, sets, way, direction == BOTH)
    call()  # compiles and tunes, which takes memory, too
    start_memory(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    call()
    peak = peak_memory(device)
    most = 0.1 if bench.toy else 1.5
    milliseconds = timed(call, device, 2 if bench.toy else 20, most).median * 1e3 / len(sets)
    replayed, note = None, None
    try:
        replayed = timed(captured(call, device), device, 2 if bench.toy else 20, most).median * 1e3 / len(sets)
    except Exception as error:  # a backend need not stand a capture
        note = f"no CUDA graph: {last_line(error)}"[:120]
        wait(device)
    share = 100 * needed / ((replayed or milliseconds) / 1e3) / bandwidth
    return {
        "ms": f"{milliseconds:.4g}",
        "graph ms": None if replayed is None else f"{replayed:.4g}",
        "needed MB": f"{needed / 1e6:.4g}",
        "%": f"{share:.3g}",
        "goal %": GOALS[direction] if case in CASES[:2] and way in (CHOSEN, "triton") else None,
        "extra MB": None if peak is None else max(0, round(peak - before / 1e6)),
        "note": note,
    }


def number_of_sets(inputs: list[Tensor], device: torch.device) -> int:
    """So many that together they are three times the cache; one on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_SETS, 1 + 3 * cache // sum(x.nbytes for x in inputs))


def call_of(case: Case, sets: list[list[Tensor]], way: str, backward: bool) -> Callable[[], object]:
    """A function that computes all sets of inputs in turn."""
    leaves = [[x.detach().requires_grad_(backward) for x in inputs] for inputs in sets]
    grads: list[Tensor] = []

    def call() -> None:
        with nullcontext() if way in (CHOSEN, TORCHS_OWN) else use_backend(way):
            for tensors in leaves:
                outputs = torchs_own(case, tensors) if way == TORCHS_OWN else case.compute(tensors)
                if not backward:
                    continue
                if not grads:
                    grads.extend(torch.randn_like(y) for y in outputs)
                torch.autograd.grad(outputs, tensors, grads)

    return call
