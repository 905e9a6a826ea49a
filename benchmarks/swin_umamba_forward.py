"""Seconds of one forward pass of Swin-UMamba and Swin-UMamba† on this machine's CPU, for each way to scan.

    python benchmarks/swin_umamba_forward.py [--size 320] [--repeats 5] [--threads N]

writes ``benchmarks/results/swin_umamba_forward_cpu.csv`` and from it the table in ``docs/swin_umamba.md``. ``native``,
``torch`` and ``reference`` are backends of the scan, ``published`` is the loop of the authors' code without a GPU (see
published_scan.py). ``prepared`` is the network as it predicts in nnU-Net (``prepare_for_inference``), ``no scan`` the
same with its scans, and what projects for them, left out: no way to scan can make it faster than that. Passes of the
fast ones alternate, so that a busy moment of the machine hits them alike; the two loops run after every second of these
turns. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from pages import DOCS, markdown, read_rows, write_table
from published_scan import use_published_scan
from torch import nn

from nnunetv2_lightnets import create_network
from nnunetv2_lightnets.costs.worker import machine
from nnunetv2_lightnets.networks import prepare_for_inference
from nnunetv2_lightnets.networks.vss import SS2D
from nnunetv2_lightnets.ops import available_backends, use_backend

NETWORKS = ("swin_umamba", "swin_umamba_d")
RESULTS = Path(__file__).parent / "results" / "swin_umamba_forward_cpu.csv"
PUBLISHED = "published"
PAGE = DOCS / "swin_umamba.md"
COLUMNS = ("network", "image", "scan", "seconds", "times faster than published", "threads", "processor", "torch")


def seconds(network: nn.Module, x: torch.Tensor, backend: str) -> float:
    """Time of one forward pass with one backend of the scan."""
    with torch.no_grad(), use_published_scan() if backend == PUBLISHED else use_backend(backend):
        start = time.perf_counter()
        network(x)
        return time.perf_counter() - start


def seconds_without_scan(network: nn.Module, x: torch.Tensor) -> float:
    """Time of one forward pass whose scans return their input."""
    with mock.patch.object(SS2D, "_scanned", lambda self, u, size: u):
        return seconds(network, x, "torch")


def forward_seconds(name: str, size: int, repeats: int) -> dict[str, float]:
    """Median time of each way, for one image of ``size`` x ``size`` pixels, one channel and 14 classes."""
    network = create_network(name, spatial_dims=2, input_channels=1, num_classes=14).eval()
    prepared = prepare_for_inference(network)
    x = torch.randn(1, 1, size, size)
    backends = [backend for backend in ("native", "torch") if available_backends()[backend] is None]
    ways = {backend: partial(seconds, network, x, backend) for backend in backends}
    ways[f"{backends[0]}, prepared"] = partial(seconds, prepared, x, backends[0])
    ways["no scan, prepared"] = partial(seconds_without_scan, prepared, x)
    times: dict[str, list[float]] = {way: [] for way in (*ways, "reference", PUBLISHED)}
    for run in ways.values():
        run()  # first use: memory, kernels
    for i in range(repeats):
        for way, run in ways.items():
            times[way].append(run())
        if i % 2:
            for backend in ("reference", PUBLISHED):
                times[backend].append(seconds(network, x, backend))
    return {way: statistics.median(values) for way, values in times.items()}


def write_page(results: Path) -> None:
    """Put what is recorded on the page."""
    write_table(PAGE, Path(__file__).name, markdown(COLUMNS, read_rows(results)))


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=320, help="side of the image in pixels")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of the fast backends")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in NETWORKS:
        times = forward_seconds(name, arguments.size, arguments.repeats)
        rows += [
            {
                "network": name,
                "image": f"1x{arguments.size}x{arguments.size}",
                "scan": way,
                "seconds": f"{time_taken:.3g}",
                "times faster than published": f"{times[PUBLISHED] / time_taken:.1f}",
                "threads": arguments.threads,
                "processor": machine(torch.device("cpu"))["processor"],
                "torch": torch.__version__,
            }
            for way, time_taken in times.items()
        ]
    with RESULTS.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_page(RESULTS)


if __name__ == "__main__":
    main()
