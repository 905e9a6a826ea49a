"""What a change of this package did to time and memory: every network in two versions and nnU-Net's own, in turns.

    pip install --no-deps --target BEFORE 'git+https://github.com/OWNER/nnunetv2_lightnets@REVISION'
    python benchmarks/versions.py --before BEFORE [--repeats 3] [--networks lightm_unet ...]

Each network computes with two threads in a process of its own, once with the package in BEFORE and once with this one:
one patch prepared for prediction, and one training step (cross-entropy) of two patches. They take turns with nnU-Net's
PlainConvUNet; all keep freed memory, as our trainers do. Memory is the growth of another process by a training step,
with an allocator that gives back what is freed. What a step takes its time for is shown by a profile: convolutions and
products of matrices run at the rate of torch's own libraries, so that no step can take less than they do. Writes
``benchmarks/results/versions.csv``. Needs some 15 minutes on a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recording import (
    MOST_ROWS,
    RESULTS,
    Record,
    Tables,
    argument_parser,
    link,
    machine,
    median_ratio,
    read_rows,
    short,
    table,
)

MEASURED = RESULTS / "versions.csv"
PAGE = "docs/memory.md"
THREADS = 2
UMAMBA = {"features": (32, 64, 128, 256, 320, 320)}  # as nnU-Net's own network has
BASELINE = "PlainConvUNet"
PATCHES = {3: (64, 64, 64), 2: (256, 256)}
STAGES = {3: 6, 2: 7}  # of nnU-Net's network for these patches
NETWORKS: dict[str, tuple[str, int, dict[str, Any]]] = {  # name: registry name, dimensions, keywords
    "lightm_unet": ("lightm_unet", 3, {"width": 32}),
    "lightm_unet S": ("lightm_unet", 3, {"width": 16}),
    "lightm_unet T": ("lightm_unet", 3, {"width": 8}),
    "ulite": ("ulite", 3, {}),
    "ultralight_unet": ("ultralight_unet", 3, {}),
    "ultralight_unet T": ("ultralight_unet", 3, {"variant": "T"}),
    "umamba_bot": ("umamba_bot", 3, {}),
    "umamba_enc": ("umamba_enc", 3, {}),
    "swin_umamba": ("swin_umamba", 2, {}),
    "swin_umamba_d": ("swin_umamba_d", 2, {}),
}
FORWARD, STEP, SHARES = "forward", "training step", "shares"
PARTS = {  # of a step: what an operator's name begins with
    "convolutions and products": ("aten::mkldnn_convolution", "aten::convolution_backward", "aten::_slow_conv",
                                  "aten::slow_conv", "aten::mm", "aten::addmm", "aten::bmm"),
    "Mamba layers": ("nnunetv2_lightnets::mamba_layer",),
    "scans": ("nnunetv2_lightnets::selective_scan", "GeneratedBackwardFor_nnunetv2_lightnets_selective_scan"),
}  # fmt: skip


def build(name: str, dims: int) -> Any:
    """A network as its trainer builds it, or nnU-Net's own."""
    if name == BASELINE:
        from networks_cpu import plain_conv_unet

        return plain_conv_unet(dims, STAGES[dims])
    from nnunetv2_lightnets import create_network

    registered, _, keywords = NETWORKS[name]
    if registered.startswith("umamba"):
        keywords = {"patch_size": PATCHES[dims], **UMAMBA}
    return create_network(registered, spatial_dims=dims, input_channels=1, num_classes=3, **keywords)


def runs(name: str, dims: int) -> dict[str, Callable[[], None]]:
    """The two things that are measured, of a network."""
    import copy

    import torch
    import torch.nn.functional as F

    from nnunetv2_lightnets.networks.inference import prepare_for_inference

    network = build(name, dims)
    x = torch.randn(2, 1, *PATCHES[dims])
    target = torch.randint(3, (2, *PATCHES[dims]))
    prepared = prepare_for_inference(copy.deepcopy(network)) if name != BASELINE else copy.deepcopy(network).eval()

    def forward() -> None:
        with torch.inference_mode():
            prepared(x[:1])

    def step() -> None:
        network.zero_grad(set_to_none=True)
        F.cross_entropy(network(x), target).backward()

    return {FORWARD: forward, STEP: step}


def serve(name: str, dims: int) -> None:
    """Run what each line of the input names; answer with its seconds, or with the shares of a step's parts."""
    import torch

    from nnunetv2_lightnets.nnunet.malloc import reuse_freed_memory

    torch.set_num_threads(THREADS)
    todo = runs(name, dims)
    print("ready", flush=True)
    for line in sys.stdin:
        reuse_freed_memory()  # as our trainers do in every step
        if line.strip() == SHARES:
            print(json.dumps(shares(todo[STEP])), flush=True)
            continue
        start = time.perf_counter()
        todo[line.strip()]()
        print(time.perf_counter() - start, flush=True)


def shares(step: Callable[[], None]) -> dict[str, float]:
    """The share of each of the PARTS in the time of a step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    return {
        part: sum(event.self_cpu_time_total for event in events if event.key.startswith(names)) / whole
        for part, names in PARTS.items()
    }


def memory(name: str, dims: int) -> None:
    """Print the bytes that a training step takes at most."""
    import torch

    from nnunetv2_lightnets.costs.memory import Memory

    torch.set_num_threads(THREADS)
    patch = PATCHES[dims]
    PATCHES[dims] = (64, *patch[1:]) if dims == 2 else (32, *patch[1:])  # libraries are loaded by a smaller step
    runs(name, dims)[STEP]()
    PATCHES[dims] = patch
    measured = Memory(torch.device("cpu"))
    step = runs(name, dims)[STEP]
    measured.start()
    step()
    step()
    print(measured.peak(), flush=True)


def process(what: str, name: str, dims: int, before: Path | None, **environment: str) -> subprocess.Popen[str]:
    """A process that computes with one of the versions."""
    paths = [str(before)] if before else []
    environment |= {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, __file__, what, name, str(dims)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def ask(server: subprocess.Popen[str], what: str) -> Any:
    """Seconds of one run, or the shares of a step's parts."""
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(what + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def measure(name: str, dims: int, before: Path, repeats: int) -> dict[str, Any]:
    """One row."""
    from training_memory import ALLOCATOR

    versions = {"before": (name, before), "after": (name, None), BASELINE: (BASELINE, None)}
    row: dict[str, Any] = {"network": name, "patch": "x".join(map(str, PATCHES[dims]))}
    for version, (network, folder) in versions.items():
        done = process("--memory", network, dims, folder, **ALLOCATOR).communicate()[0]
        row[f"{version} MB"] = round(int(done.splitlines()[-1]) / 1e6)
    servers = {version: process("--serve", network, dims, folder) for version, (network, folder) in versions.items()}
    for server in servers.values():
        assert server.stdout is not None
        server.stdout.readline()
    for what in (FORWARD, STEP):
        seconds: dict[str, list[float]] = {version: [] for version in servers}
        for turn in range(repeats + 2):
            for version, server in servers.items():
                took = ask(server, what)
                if turn > 1:  # memory is kept from the second on
                    seconds[version].append(took)
        for version in ("before", "after"):
            row[f"{version} {what}"] = short(median_ratio(seconds[version], seconds[BASELINE]))
        row[f"{BASELINE} {what} (s)"] = short(sorted(seconds[BASELINE])[repeats // 2])
    for part, share in ask(servers["after"], SHARES).items():
        row[f"after {STEP}, {part}"] = short(share * float(row[f"after {STEP}"]))
    for server in servers.values():
        server.communicate()
    return row | machine("threads", "processor", "torch") | {"threads": THREADS}


def tables() -> Tables:
    """Memory and time, before and after, as multiples of nnU-Net's."""
    recorded = read_rows(MEASURED)
    if not recorded:
        return {}
    lines = []
    for row in recorded:
        base = float(row[f"{BASELINE} MB"])
        shown = {"network": f"`{row['network']}`", "patch": row["patch"].replace("x", "×")}
        shown["memory of a step"] = f"{float(row['before MB']) / base:.2f} → {float(row['after MB']) / base:.2f}"
        for what in (STEP, FORWARD):
            shown[f"time of a {what}"] = f"{row[f'before {what}']} → {row[f'after {what}']}"
        lines.append(shown | {f"of a {STEP}: {part}": row[f"after {STEP}, {part}"] for part in PARTS})
    return {PAGE: [*table(lines[:MOST_ROWS]), "", link(PAGE, MEASURED, "All networks")]}


def main() -> None:
    """Measure and record."""
    if sys.argv[1:2] in (["--serve"], ["--memory"]):
        {"--serve": serve, "--memory": memory}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
        return
    parser = argument_parser(__doc__)
    parser.add_argument("--before", type=Path, required=True, help="folder that the other version is installed in")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=MEASURED)
    args = parser.parse_args()
    record = Record(args.out, "network", "patch")
    for name in args.networks:
        record.put(measure(name, NETWORKS[name][1], args.before, args.repeats))


if __name__ == "__main__":
    main()
