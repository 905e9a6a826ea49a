"""Seconds of one forward pass of Swin-UMamba and Swin-UMamba† on this machine's CPU, for each way to scan.

    python benchmarks/swin_umamba_forward.py [--size 320] [--repeats 5] [--threads N]

writes ``benchmarks/results/swin_umamba_forward_cpu.csv``. ``native``, ``torch`` and ``reference`` are backends of the
scan, ``published`` is the loop of the authors' code without a GPU (see published_scan.py). ``prepared`` is the network
as it predicts in nnU-Net (``prepare_for_inference``), ``no scan`` the same with its scans, and what projects for them,
left out: no way to scan can make it faster than that. Passes of the fast ones alternate, so that a busy moment of the
machine hits them alike; the two loops, which take many seconds, come after them. Run it on a machine that does nothing
else.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from published_scan import use_published_scan
from recording import RESULTS, Record, Tables, argument_parser, link, machine, read_rows, table, take_turns
from torch import nn

from nnunetv2_lightnets import create_network
from nnunetv2_lightnets.networks import prepare_for_inference
from nnunetv2_lightnets.networks.vss import SS2D
from nnunetv2_lightnets.ops import available_backends, use_backend

NETWORKS = ("swin_umamba", "swin_umamba_d")
FORWARD = RESULTS / "swin_umamba_forward_cpu.csv"
PAGE = "docs/swin_umamba.md"
PUBLISHED = "published"
FACTS = ("threads", "processor", "torch")


def forward(network: nn.Module, x: torch.Tensor, backend: str) -> Callable[[], None]:
    """A forward pass with one backend of the scan."""

    def run() -> None:
        with torch.no_grad(), use_published_scan() if backend == PUBLISHED else use_backend(backend):
            network(x)

    return run


def without_scan(run: Callable[[], None]) -> None:
    """The same with scans that return their input."""
    with mock.patch.object(SS2D, "_scanned", lambda self, u, size: u):
        run()


def forward_seconds(name: str, size: int, repeats: int) -> dict[str, float]:
    """Median time of each way, for one image of ``size`` x ``size`` pixels, one channel and 14 classes."""
    network = create_network(name, spatial_dims=2, input_channels=1, num_classes=14).eval()
    prepared = prepare_for_inference(network)
    x = torch.randn(1, 1, size, size)
    backends = [backend for backend in ("native", "torch") if available_backends()[backend] is None]
    ways = {backend: forward(network, x, backend) for backend in backends}
    ways[f"{backends[0]}, prepared"] = forward(prepared, x, backends[0])
    ways["no scan, prepared"] = partial(without_scan, forward(prepared, x, "torch"))
    times = take_turns(ways, repeats)
    times |= take_turns({way: forward(network, x, way) for way in ("reference", PUBLISHED)}, max(1, repeats // 2))
    return {way: statistics.median(values) for way, values in times.items()}


def tables() -> Tables:
    """A row for each way to scan, a column for each network: seconds, and how many times faster than published."""
    recorded, rows = read_rows(FORWARD), {}
    for row in recorded:
        faster = float(row["times faster than published"])
        text = f"{row['seconds']} s" + (f" ({faster:.0f}×)" if faster != 1 else "")
        rows.setdefault(row["scan"], {"scan": f"`{row['scan']}`"})[row["network"]] = text
    about = ", ".join(f"{fact} {recorded[0][fact]}" for fact in FACTS)
    return {PAGE: [f"Measured with: {about}.", "", *table(list(rows.values())), "", link(PAGE, FORWARD)]}


def main() -> None:
    """Measure and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--size", type=int, default=320, help="side of the image in pixels")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of the fast backends")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record = Record(FORWARD, "network", "image", "scan")
    for name in NETWORKS:
        times = forward_seconds(name, arguments.size, arguments.repeats)
        for way, seconds in times.items():
            row = {"network": name, "image": f"1x{arguments.size}x{arguments.size}", "scan": way}
            row |= {"seconds": f"{seconds:.3g}", "times faster than published": f"{times[PUBLISHED] / seconds:.1f}"}
            record.put(row | machine(*FACTS))


if __name__ == "__main__":
    main()
