"""Time, extra memory and error of the selective scan on this machine's CPU, for every way to compute it.

    python benchmarks/selective_scan.py [--threads N] [--rounds 7] [--seconds 3] [--only s]

writes ``benchmarks/results/selective_scan.csv``, beside it ``selective_scan_machine.json``, and from both the table in
``docs/selective_scan.md`` (which tables.py writes again without measuring). Implementations take
turns in one process, so that a busy moment of the machine hits them alike; each takes at most ``--rounds`` turns, and
none that it would start after ``--seconds`` of its own. Memory is measured in a fresh process for each row, errors
against the torch backend in float64 (which the tests hold to the textbook loop). Run it on a machine that does nothing
else, for about six minutes.

- ``published``: the loop as published networks run it without a GPU, see published_scan.py. Only forwards: its
  backward pass through autograd takes time quadratic in the length, more than ten minutes at ``s``;
- ``loop``: the same token by token, without tensors of all tokens and states (the "reference" backend);
- ``mambapy``: the parallel scan of mambapy (https://github.com/alxndrTL/mamba.py, MIT), where that is installed;
- ``torch``, ``native``: backends of this package;
- ``exp2 alone``: one call of torch.exp2 on as many numbers as there are decays, in pieces that stay in the cache. No
  way to scan that computes every decay with torch's functions is faster;
- ``bound``: the compute bound of the forward scan on this machine, memory and everything per token left out. Updating
  one state takes 12 operations of a vector lane: dt A, 8 of exp2 (3 to round, 5 for a polynomial of degree 5), x B,
  and the two multiply-adds of the state and the output. The rate of such operations is measured: multiply-adds per
  second of torch's float32 matrix product in the cache, the fastest of several sizes, on as many threads as the case
  has. A matrix product does not quite reach the processor's peak, so the true bound is a little lower;
- ``native, kernel``: the time of ``native`` less ``one token``, the same call for a single token, which is what any
  call takes for dispatch and allocation. Only in the case ``cache``, which fits the second cache level and runs on one
  thread: there nothing but computing counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from published_scan import use_published_scan
from recording import RESULTS, Record, Tables, link, read_rows, short, table, write_tables
from torch import Tensor

from nnunetv2_lightnets.files import write_atomically
from nnunetv2_lightnets.ops import (
    available_backends,
    causal_conv1d,
    directional_scan,
    scan_order,
    selective_scan,
    use_backend,
)

RECORDED, MACHINE = RESULTS / "selective_scan.csv", RESULTS / "selective_scan_machine.json"
PAGE = "docs/selective_scan.md"
MIB = 2**20
ONE_TOKEN = "one token"
PUBLISHED = "published"
SLOW = (PUBLISHED, "loop", "mambapy")


@dataclass(frozen=True)
class Case:
    """Sizes of one call; ``image`` makes it a directional scan along four paths, ``width`` a convolution."""

    about: str
    batch: int
    channels: int
    length: int
    state: int = 16
    groups: int = 1
    image: tuple[int, int] | None = None
    width: int = 0
    slow_ones: bool = True  # whether SLOW are measured: minutes and many GB where there are many tokens
    in_cache: bool = False  # only native against the bound: on one thread, many calls to a turn

    def arguments(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Random arguments in channels-last memory, step sizes as a trained network has them (about 0.02)."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        batch, channels, length, state, groups = self.batch, self.channels, self.length, self.state, self.groups
        u = normal(batch, length, channels).mT
        if self.width:
            return [u, normal(channels, self.width), normal(channels)]
        A = -torch.arange(1.0, state + 1).to(dtype).repeat(groups * channels if self.image else channels, 1)
        B, C = (normal(batch, length, groups, state).permute(0, 2, 3, 1) for _ in range(2))
        if self.image:
            delta = normal(batch, length, groups, channels).permute(0, 2, 3, 1)
            D, delta_bias = normal(groups, channels), normal(groups, channels) - 4
            return [u, delta, A.view(groups, channels, state), B, C, D, delta_bias]
        return [u, normal(batch, length, channels).mT, A, B, C, normal(channels), normal(channels) - 4]

    def sizes(self) -> str:
        """The sizes in words."""
        text = f"B {self.batch}, D {self.channels}, L {self.length}"
        return f"{text}, kernel size {self.width}" if self.width else f"{text}, N {self.state}, groups {self.groups}"

    def updates(self) -> int:
        """States that are updated, over all tokens."""
        return self.batch * self.channels * self.length * self.state * (self.groups if self.image else 1)


CASES = {
    "cache": Case("all in the second cache level, 1 thread", 1, 64, 512, in_cache=True),
    "s": Case("LightM-UNet 3D, first stage of a 64^3 patch", 1, 64, 32_768),
    "m": Case("Swin-UMamba as plain scans, 80 x 80 pixels, 4 groups", 1, 768, 6_400, groups=4),
    "l": Case("LightM-UNet 3D, 64^3 tokens", 1, 64, 262_144, slow_ones=False),
    "short": Case("a bottleneck of 512 tokens", 1, 512, 512),
    "directional": Case("Swin-UMamba, 80 x 80 pixels, 4 directions", 1, 192, 6_400, groups=4, image=(80, 80)),
    "conv": Case("the convolution before s, kernel size 4, SiLU", 1, 64, 32_768, width=4),
}


def ours(case: Case, backend: str) -> Callable[..., Tensor]:
    """The public function for a case, with a backend forced, or with the loop of published networks."""
    order = scan_order(case.image) if case.image else None

    def compute(*arguments: Tensor) -> Tensor:
        with use_published_scan() if backend == PUBLISHED else use_backend(backend):
            if case.width:
                return causal_conv1d(*arguments, activation="silu")
            if order is not None:
                return directional_scan(*arguments, delta_softplus=True, order=order)
            return selective_scan(*arguments[:6], None, arguments[6], True)

    return compute


def mambapy(case: Case) -> Callable[..., Tensor] | None:
    """The scan by mambapy, which takes decays and inputs of all tokens and states at once."""
    try:
        from mambapy.pscan import pscan
    except ImportError:
        return None

    def compute(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        per_group = case.channels // case.groups
        step = F.softplus(delta + bias[:, None]).mT  # (B, L, D)
        B, C = (x.repeat_interleave(per_group, dim=1).permute(0, 3, 1, 2) for x in (B, C))  # (B, L, D, N)
        states = pscan(torch.exp(step.unsqueeze(-1) * A), (step * u.mT).unsqueeze(-1) * B)
        return ((states * C).sum(-1) + D * u.mT).mT

    return compute


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution by torch's own, as mamba-ssm falls back to."""
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(bias))[..., : x.shape[2]])


def exp2_alone(case: Case) -> Callable[..., None]:
    """As many exponentials as there are decays."""
    piece = torch.rand(32 * 1024 * torch.get_num_threads()).neg_()
    result = torch.empty_like(piece)
    pieces = case.updates() // len(piece)

    def compute(*_: Tensor) -> None:
        for _ in range(pieces):
            torch.exp2(piece, out=result)

    return compute


def one_token(case: Case) -> Callable[..., Tensor]:
    """A call like those of a case for one token, whatever the arguments are."""
    single = replace(case, length=1)
    compute, own = ours(single, "native"), single.arguments()

    return lambda *arguments: compute(*own)


LANE_OPERATIONS = 12  # to update one state, see above


@cache
def lane_operations_per_second(threads: int) -> float:
    """Fused multiply-adds per second in torch's float32 matrix product, of matrices that fit the cache."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    best = 0.0
    for size in (192, 256, 384, 512):
        left, right, result = torch.rand(3, size, size).unbind()
        for _ in range(100):
            start = time.perf_counter()
            for _ in range(5):
                torch.mm(left, right, out=result)
            best = max(best, 5 * size**3 / (time.perf_counter() - start))
    torch.set_num_threads(before)
    return best


def bound(case: Case, threads: int) -> float:
    """Seconds that the arithmetic of a forward scan takes at least."""
    return LANE_OPERATIONS * case.updates() / lane_operations_per_second(threads)


def implementations(case: Case, backward: bool) -> dict[str, Callable[..., Tensor | None]]:
    """Ways to compute a case, by name."""
    found: dict[str, Callable[..., Tensor | None]] = {}
    if case.width:
        found["torch's conv1d"] = torch_conv
    elif case.slow_ones and not case.in_cache:
        if not backward:
            found[PUBLISHED] = ours(case, PUBLISHED)
            found["loop"] = ours(case, "reference")
        if not case.image and (function := mambapy(case)):
            found["mambapy"] = function
    for backend in ("native",) if case.in_cache else ("torch", "native"):
        if available_backends()[backend] is None:
            found[backend] = ours(case, backend)
    if not (case.width or backward or case.in_cache):
        found["exp2 alone"] = exp2_alone(case)
    return found


def run(function: Callable[..., Tensor | None], arguments: list[Tensor], backward: bool) -> list[Tensor]:
    """Output and, with ``backward``, gradients."""
    if not backward:
        with torch.no_grad():
            out = function(*arguments)
        return [] if out is None else [out]
    leaves = [x.detach().requires_grad_() for x in arguments]
    out = function(*leaves)
    assert out is not None
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def times(
    functions: dict[str, Callable[..., Tensor | None]],
    arguments: list[Tensor],
    backward: bool,
    rounds: int,
    most: float,
    calls: int,
) -> tuple[dict[str, list[float]], dict[str, list[Tensor]]]:
    """Seconds of every implementation, which take turns, and its results."""
    measured: dict[str, list[float]] = {name: [] for name in functions}
    results = {}
    for name, function in functions.items():
        if name not in SLOW:  # whose first call is like any other, and long
            run(function, arguments, backward)
    for _ in range(rounds):
        for name, function in functions.items():
            if sum(measured[name]) < most:
                start = time.perf_counter()
                for _ in range(calls):
                    results[name] = run(function, arguments, backward)
                measured[name].append((time.perf_counter() - start) / calls)
    return measured, results


def largest_error(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of an output or gradient, relative to its largest value."""
    return max(
        ((ours.double() - wanted).abs().max() / wanted.abs().max()).item()
        for ours, wanted in zip(results, expected, strict=True)
    )


def extra_memory(name: str, case: str, backward: bool) -> float | None:
    """MiB that one call takes beside its arguments, output and gradients included, measured in a fresh process."""
    command = [sys.executable, __file__, "--memory", name, "--only", case, *(["--backward"] if backward else [])]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(process.stdout) if process.returncode == 0 else None


def print_memory(name: str, case: Case, backward: bool) -> None:
    """Print MiB by which the resident memory's peak exceeds what is resident before the call."""
    function = implementations(case, backward)[name]
    small = Case("", 1, 4, 4, groups=case.groups, image=(2, 2) if case.image else None, width=case.width)
    run(implementations(small, backward)[name], small.arguments(), backward)  # first use: libraries
    arguments = case.arguments()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here (Linux)
    page = resource.getpagesize()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * page
    run(function, arguments, backward)
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    print(f"{(peak - before) / MIB:.1f}")


def machine() -> dict[str, str | int | list[str]]:
    """What the figures were measured on."""
    about: dict[str, str | int | list[str]] = {
        "processor": platform.processor() or platform.machine(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "instructions of torch": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mambapy": version("mambapy") if find_spec("mambapy") else "not installed, so not compared",
        "date": time.strftime("%Y-%m-%d"),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        about["processor"] = next(value.strip() for key, _, value in lines if key.strip() == "model name")
    if available_backends()["native"] is None:
        from nnunetv2_lightnets.ops.native_library import instruction_sets

        about["instructions of native"] = instruction_sets()[0]
    return about


def rows_of(name: str, case: Case, backward: bool, rounds: int, most: float) -> list[dict[str, str | int]]:
    """Rows of the table for one case, forwards or forwards and backwards."""
    before = torch.get_num_threads()
    threads = 1 if case.in_cache else before
    torch.set_num_threads(threads)
    functions = implementations(case, backward)
    arguments = case.arguments()
    if case.in_cache and not backward:
        functions[ONE_TOKEN] = one_token(case)
    expected = run(ours(case, "torch"), case.arguments(torch.float64), backward)
    measured, all_results = times(functions, arguments, backward, rounds, most, 300 if case.in_cache else 1)
    least = None if backward or case.width else bound(case, threads)
    rows: list[dict[str, str | int]] = []
    slowest = statistics.median(next(iter(measured.values())))

    def add(implementation: str, seconds: list[float], memory: float | None, error: str) -> None:
        median = statistics.median(seconds)
        rows.append(
            {
                "case": name,
                "pass": "forward+backward" if backward else "forward",
                "implementation": implementation,
                "ms": f"{1e3 * median:.3g}",
                "fastest ms": f"{1e3 * min(seconds):.3g}",
                "calls": len(seconds),
                "times faster than the first": f"{slowest / median:.3g}",
                "% of the bound": "" if least is None else f"{100 * least / median:.3g}",
                "extra MiB": "" if memory is None else f"{memory:.0f}",
                "largest relative error": error,
                "threads": threads,
                "about": case.about,
            }
        )

    for implementation, seconds in measured.items():
        results = all_results[implementation]
        if results and implementation != ONE_TOKEN:
            memory = None if case.in_cache else extra_memory(implementation, name, backward)
            add(implementation, seconds, memory, f"{largest_error(results, expected):.1e}")
        else:
            add(implementation, seconds, None, "")
    if ONE_TOKEN in measured:
        pairs = zip(measured["native"], measured[ONE_TOKEN], strict=True)
        add("native, kernel", [whole - fixed for whole, fixed in pairs], None, "")
    if least is not None:
        add("bound", [least], None, "")
    torch.set_num_threads(before)
    return rows


COLUMNS = (  # of the table on the page: title, pass, implementation and what of it
    ("published, ms", "forward", PUBLISHED, "ms"),
    ("torch, ms", "forward", "torch", "ms"),
    ("native, ms", "forward", "native", "ms"),
    ("native, % of the bound", "forward", "native", "% of the bound"),
    ("torch, with gradients, ms", "forward+backward", "torch", "ms"),
    ("native, with gradients, ms", "forward+backward", "native", "ms"),
    ("native, extra MiB", "forward+backward", "native", "extra MiB"),
    ("native, largest relative error", "forward+backward", "native", "largest relative error"),
)


def tables() -> Tables:
    """The most telling of what is recorded, one row a case, and the machine."""
    rows = {(row["case"], row["pass"], row["implementation"]): row for row in read_rows(RECORDED)}
    chosen = []
    for name, case in CASES.items():
        cells = {"case": name}
        for title, way, implementation, value in COLUMNS:
            recorded = rows.get((name, way, implementation), {}).get(value, "")
            cells[title] = short(float(recorded)) if recorded and value == "ms" else recorded
        chosen.append((cells, f"- `{name}`: {case.sizes()}; {case.about}."))
    lines = [*table([cells for cells, _ in chosen]), "", *(about for _, about in chosen), "", link(PAGE, RECORDED), ""]
    about = json.loads(MACHINE.read_text())
    lines.append("Measured on: " + ", ".join(f"{key} {value}" for key, value in about.items()) + ".")
    return {PAGE: lines}


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--rounds", type=int, default=7, help="most turns of each implementation")
    parser.add_argument("--seconds", type=float, default=3, help="no turn starts later than this")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases to measure")
    parser.add_argument("--output", type=Path, default=RECORDED, help="where to write the table")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # in the fresh process: the implementation to measure
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print_memory(arguments.memory, CASES[arguments.only[0]], arguments.backward)
        return
    if find_spec("mambapy") is None:
        print("mambapy is not installed, so not compared: pip install --no-deps mambapy", file=sys.stderr)
    arguments.output.parent.mkdir(exist_ok=True)
    description = arguments.output.with_name(f"{arguments.output.stem}_machine.json")
    write_atomically(description, json.dumps(machine(), indent=1) + "\n")
    record = Record(arguments.output, "case", "pass", "implementation")  # cases that are not measured now are kept
    for name in arguments.only:
        for backward in (False, True):
            record.put(*rows_of(name, CASES[name], backward, arguments.rounds, arguments.seconds))
    if arguments.output == RECORDED:
        write_tables(Path(__file__).stem, tables())


if __name__ == "__main__":
    main()
