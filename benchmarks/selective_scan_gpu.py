"""Values, times and memory traffic of the selective scan on a CUDA device.

    python benchmarks/selective_scan_gpu.py [--rounds 20] [--output benchmarks/results/selective_scan_gpu.csv]

writes a CSV and, beside it, ``..._machine.json``. Without a CUDA device it says so and exits with 2.

First come values: output and all gradients of the triton backend in float32 against the reference in float64, at sizes
that the loop can do, and the largest error relative to the largest value. Then the times of the triton backend, of
mamba-ssm's kernel where that answers, and of the torch backend, forwards and forwards with backwards (the median of
calls between CUDA events), at sizes of LightM-UNet at 32^3 and 128^3 and of Swin-UMamba. A way that runs out of memory
has no times.

``needed MB``: every input read and every output (or gradient) written once. ``moved MB``: what the kernels of the
triton backend ask for, by the counts in nnunetv2_lightnets/ops/selective_scan/triton_scan.py without its caches and
small terms: forwards inputs twice where the sequence is cut into segments. ``% of copy bandwidth`` is needed bytes by
time, relative to the rate at which the device copies 1 GiB (read and written bytes both counted).
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nnunetv2_lightnets.ops import available_backends, directional_scan, scan_order, selective_scan, use_backend

RESULTS = Path(__file__).parent / "results"
STATE = 16


@dataclass(frozen=True)
class Case:
    """Sizes of one call; ``image`` makes it a directional scan along four paths."""

    batch: int
    channels: int
    length: int
    image: tuple[int, int] | None = None

    def arguments(self) -> list[Tensor]:
        """u, delta, A, B, C, D, delta_bias on the device in channels-last memory, step sizes of about 0.02."""
        torch.manual_seed(0)
        paths = (4,) if self.image else ()
        options = {"device": "cuda"}
        tokens = (self.batch, *paths, self.length)
        A = -torch.arange(1.0, STATE + 1, **options).expand(*paths, self.channels, STATE).contiguous()
        B, C = (torch.randn(*tokens, STATE, **options).mT for _ in range(2))  # (B, [K,] N, L)
        delta = torch.randn(*tokens, self.channels, **options).mT  # (B, [K,] D, L)
        u = torch.randn(self.batch, self.length, self.channels, **options).mT  # (B, D, L)
        D, bias = torch.randn(2, *paths, self.channels, **options)
        return [u, delta, A, B, C, D, bias - 4]

    def function(self) -> Callable[..., Tensor]:
        """The public function, with whatever backend is forced around it."""
        if self.image:
            order = scan_order(self.image, device="cuda")
            return lambda *x: directional_scan(*x, delta_softplus=True, order=order)
        return lambda *x: selective_scan(*x[:6], None, x[6], True)


CHECKED = (Case(2, 35, 300), Case(1, 64, 2_049), Case(2, 24, 120, (10, 12)))
TIMED = (Case(1, 64, 32_768), Case(1, 64, 2_097_152), Case(2, 768, 6_400, (80, 80)))


def results_of(case: Case, backend: str, arguments: list[Tensor], backward: bool = True) -> list[Tensor]:
    """Output and, with ``backward``, gradients."""
    leaves = [x.detach().requires_grad_(backward) for x in arguments]
    with use_backend(backend):
        out = case.function()(*leaves)
        return [out.detach(), *(torch.autograd.grad(out, leaves, torch.ones_like(out)) if backward else ())]


def largest_error(case: Case) -> float:
    """Of the triton backend in float32, against the reference in float64."""
    arguments = case.arguments()
    found = results_of(case, "triton", arguments)
    wanted = results_of(case, "reference", [x.double() for x in arguments])
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(found, wanted, strict=True))


def milliseconds(compute: Callable[[], object], rounds: int) -> float:
    """Median time on the device, after two calls that are not counted."""
    found = []
    for i in range(rounds + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        compute()
        end.record()
        end.synchronize()
        if i >= 2:
            found.append(start.elapsed_time(end))
    return statistics.median(found)


def copy_bandwidth(rounds: int) -> float:
    """Bytes per second, read and written, of copying 1 GiB."""
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / (milliseconds(lambda: target.copy_(source), rounds) / 1e3)


def traffic(case: Case, arguments: list[Tensor], backward: bool) -> tuple[float, float]:
    """Bytes needed, and asked for by the triton backend."""
    u, delta, _, B, C, *_ = (4.0 * x.numel() for x in arguments)
    paths = 4 if case.image else 1
    inputs = u + delta + B + C
    needed = inputs + u
    # u and the output once per path; outputs of several paths are written, read again and summed
    moved = paths * u + delta + B + C + (u if paths == 1 else (2 * paths + 1) * u)
    moved += paths * u + delta + B  # pass 1, where sequences are cut
    if backward:
        states = paths * u * STATE / 64
        needed += inputs + u + inputs
        moved += 2 * states + 2 * paths * u + delta + B + C + delta + B + C  # pass 3: reads, then gradients
        moved += u if paths == 1 else (2 * paths + 1) * u  # du
        moved += paths * u + delta + C  # pass 1
    return needed, moved


def time_case(case: Case, rounds: int, bandwidth: float) -> list[dict[str, str | int]]:
    """Rows of one case."""
    arguments = case.arguments()
    rows: list[dict[str, str | int]] = []
    for backend in ("triton", "mamba_ssm", "torch"):
        if available_backends()[backend] is not None or (case.image and backend == "mamba_ssm"):
            continue
        for backward in (False, True):
            row: dict[str, str | int] = {
                "size": f"({case.batch}, {case.channels}, {case.length})" + (" 4 directions" if case.image else ""),
                "pass": "forward+backward" if backward else "forward",
                "backend": backend,
            }
            torch.cuda.empty_cache()
            try:
                results_of(case, backend, arguments, backward)
                ms = milliseconds(lambda b=backend, w=backward: results_of(case, b, arguments, w), rounds)
            except torch.cuda.OutOfMemoryError:
                rows.append(row | dict.fromkeys(("ms", "needed MB", "moved MB", "% of copy bandwidth"), ""))
                continue
            needed, moved = traffic(case, arguments, backward)
            row["ms"] = f"{ms:.3g}"
            row["needed MB"] = f"{needed / 1e6:.4g}"
            row["moved MB"] = f"{moved / 1e6:.4g}" if backend == "triton" else ""
            row["% of copy bandwidth"] = f"{100 * needed / (ms / 1e3) / bandwidth:.3g}"
            rows.append(row)
            print("  ".join(str(value) for value in row.values()), flush=True)
    return rows


def main() -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="calls of each way that are timed")
    parser.add_argument("--output", type=Path, default=RESULTS / "selective_scan_gpu.csv", help="where to write")
    arguments = parser.parse_args()
    reason = available_backends()["triton"] if torch.cuda.is_available() else "torch sees no CUDA device"
    if reason:
        print(f"selective_scan_gpu.py: nothing to measure: {reason}", file=sys.stderr)
        return 2
    errors = {f"({x.batch}, {x.channels}, {x.length}) {x.image or ''}".strip(): largest_error(x) for x in CHECKED}
    print("largest relative errors against float64:", errors)
    bandwidth = copy_bandwidth(arguments.rounds)
    rows = [row for case in TIMED for row in time_case(case, arguments.rounds, bandwidth)]
    arguments.output.parent.mkdir(exist_ok=True)
    with arguments.output.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    about = {
        "device": torch.cuda.get_device_name(),
        "copy bandwidth, GB/s": round(bandwidth / 1e9),
        "largest relative errors of triton": errors,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "mamba_ssm": available_backends()["mamba_ssm"] or "compared",
        "system": platform.platform(),
    }
    arguments.output.with_name(f"{arguments.output.stem}_machine.json").write_text(json.dumps(about, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
