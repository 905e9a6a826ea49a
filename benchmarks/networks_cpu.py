"""Seconds per forward pass and per training step on this machine's CPU, beside nnU-Net's own network.

    python benchmarks/networks_cpu.py [--threads 2] [--repeats 7]

measures LightM-UNet against nnU-Net's PlainConvUNet and writes ``benchmarks/results/networks_cpu.csv``, and from it the
table in ``docs/lightm_unet.md``:

- ``forward``: a patch of 64x64x64, no gradients, PlainConvUNet with 6 stages (32 to 320 features);
- ``forward, not in blocks``: the same with every Mamba layer computed for all tokens at once;
- ``forward, published scan``: the same for all tokens at once, with the scan as published networks run it without a GPU
  (published_scan.py; once; about a minute, and some GB);
- ``forward, no scan``: the same with the scan left out, which shows what the rest costs;
- ``products``: the matrix products of that forward pass alone, with results written into mapped memory, each at its
  own shape; and ``products at the rate of (262144, 64) x (64, 256)``. No forward pass can take less;
- ``convolutions`` (causal, with SiLU) and ``layer norms``: the same for the steps that cost most beside them. These,
  the products and the scan together are the floor of a network that runs step by step, whatever calls the steps;
- ``training step``: forward, cross-entropy and backward of two patches of 40x56x40, PlainConvUNet with 4 stages.

Networks take turns, so that a busy moment of the machine hits them alike; ratios are medians of the ratios of one turn.
Any other network and patch:

    python benchmarks/networks_cpu.py --network ulite --network lightm_unet:width=16 --patch 96 96 96 [--train]

prints, and writes nothing. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from pages import DOCS, markdown, read_rows, write_table
from published_scan import use_published_scan
from torch import Tensor, nn

from nnunetv2_lightnets import create_network
from nnunetv2_lightnets.networks import lightm_unet, mamba
from nnunetv2_lightnets.ops import available_backends, causal_conv1d
from nnunetv2_lightnets.ops.selective_scan.native import instruction_sets

CLASSES = 3
RESULTS = Path(__file__).parent / "results" / "networks_cpu.csv"
PAGE = DOCS / "lightm_unet.md"
BASELINE = "PlainConvUNet"
LIGHT = {f"lightm_unet, width {width}": {"width": width} for width in (32, 16, 8)}
ROW = ("measurement", "network", "parameters", "patch", "batch", "median seconds", "fastest", f"times {BASELINE}")


def plain_conv_unet(spatial_dims: int, stages: int) -> nn.Module:
    """What nnU-Net plans for one input channel: two convolutions per stage, instance norm, leaky ReLU."""
    return PlainConvUNet(
        1,
        stages,
        [min(32 * 2**stage, 320) for stage in range(stages)],
        nn.Conv3d if spatial_dims == 3 else nn.Conv2d,
        3,
        [1] + [2] * (stages - 1),
        2,
        CLASSES,
        2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d if spatial_dims == 3 else nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


def stages_of(patch: Sequence[int]) -> int:
    """Stages that nnU-Net plans: every axis is halved while at least 4 voxels remain, 6 stages at most in 3D."""
    halvings = max(int(side).bit_length() - 3 for side in patch)
    return min(halvings + 1, 6 if len(patch) == 3 else 8)


# ---- What is timed ----


def forward(network: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A forward pass without gradients."""

    def run() -> None:
        with torch.inference_mode():
            network(x)

    network.eval()
    return run


def training_step(network: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Forward, cross-entropy, backward."""
    target = torch.randint(CLASSES, (x.shape[0], *x.shape[2:]))

    def run() -> None:
        network.zero_grad()
        F.cross_entropy(network(x), target).backward()

    network.train()
    return run


@contextmanager
def patched(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """A name of a module means something else for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def skip_scan(u: Tensor, delta: Tensor, A: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """In the place of the scan: its input, and a state of zeros."""
    return u, A.new_zeros(u.shape[0], *A.shape)


def not_in_blocks(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same for all tokens at once."""

    def whole() -> None:
        with patched(lightm_unet, "computes_in_blocks", lambda tokens: False):
            run()

    return whole


def with_published_scan(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same for all tokens at once with the loop of published networks."""
    whole = not_in_blocks(run)

    def slow() -> None:
        with use_published_scan():
            whole()

    return slow


def without_scan(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same without the scan."""

    def skipping() -> None:
        with patched(mamba, "selective_scan", skip_scan):
            run()

    return skipping


def products(network: nn.Module, x: Tensor) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs of each matrix product of a forward pass of the whole patch."""
    found: list[tuple[int, int, int]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        found.append((out.numel() // out.shape[-1], module.in_features, module.out_features))

    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    hooks = [linear.register_forward_hook(note) for linear in linears]
    network.eval()(x)  # with gradients: as a whole, not in blocks
    for hook in hooks:
        hook.remove()
    for module in network.modules():  # these two are computed without a call of their module
        if isinstance(module, mamba.Mamba):
            rows = next(r for r, inputs, outputs in found if outputs == 2 * module.d_inner)
            found += [(rows, module.dt_rank, module.d_inner), (rows, module.d_inner, module.d_inner // 2)]
    return found


def rows_per_block(widest: int) -> int:
    """Rows of a block that stays in the caches, as in prediction."""
    return max(256, 2**20 // widest)


def one_product(rows: int, inputs: int, outputs: int) -> Callable[[], Any]:
    """One product into mapped memory, block by block."""
    step = rows_per_block(max(inputs, outputs))
    x, weight, out = torch.randn(min(rows, step), inputs), torch.randn(inputs, outputs), torch.empty(step, outputs)

    def run() -> None:
        for start in range(0, rows, step):
            count = min(step, rows - start)
            torch.mm(x[:count], weight, out=out[:count])

    return run


def one_convolution(rows: int, channels: int) -> Callable[[], Any]:
    """One causal convolution with SiLU, which reads half the channels of its input, block by block."""
    step = min(rows, rows_per_block(2 * channels))
    x, weight, bias = torch.randn(1, step, 2 * channels), torch.randn(channels, 4), torch.randn(channels)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(0, rows, step):
                causal_conv1d(x[..., :channels].transpose(1, 2), weight, bias, activation="silu")

    return run


def one_layer_norm(rows: int, channels: int) -> Callable[[], Any]:
    """One layer norm, block by block."""
    step = min(rows, rows_per_block(4 * channels))
    x, weight, bias = torch.randn(1, step, channels), torch.randn(channels), torch.randn(channels)

    def run() -> None:
        for _ in range(0, rows, step):
            F.layer_norm(x, (channels,), weight, bias)

    return run


def layers(network: nn.Module, x: Tensor) -> list[tuple[int, int]]:
    """Tokens and channels of each Mamba layer."""
    found: list[tuple[int, int]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        found.append((inputs[0].shape[0] * inputs[0].shape[1], inputs[0].shape[2]))

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, mamba.Mamba)]
    network.eval()(x)
    for hook in hooks:
        hook.remove()
    return found


# ---- Timing ----


def take_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run, one after the other, ``repeats`` times, after one that does not count."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def total(make: Callable[..., Callable[[], Any]], shapes: Sequence[tuple[int, ...]]) -> float:
    """Seconds of one step after the other, for all shapes."""
    return sum(min(take_turns({"": make(*shape)}, 3)[""]) * shapes.count(shape) for shape in sorted(set(shapes)))


def rows_of(
    measurement: str, seconds: dict[str, list[float]], networks: dict[str, nn.Module], x: Tensor, base: list[float]
) -> list[dict[str, Any]]:
    """Rows of the table."""
    return [
        {
            "measurement": measurement,
            "network": name,
            "parameters": sum(p.numel() for p in networks[name].parameters()),
            "patch": "x".join(map(str, x.shape[2:])),
            "batch": x.shape[0],
            "median seconds": f"{statistics.median(values):.4g}",
            "fastest": f"{min(values):.4g}",
            f"times {BASELINE}": f"{statistics.median(v / b for v, b in zip(values, base, strict=False)):.3g}",
        }
        for name, values in seconds.items()
    ]


def measure_forward(repeats: int) -> list[dict[str, Any]]:
    """LightM-UNet's forward pass, what it is made of, and its floor."""
    x = torch.randn(1, 1, 64, 64, 64)
    networks: dict[str, nn.Module] = {BASELINE: plain_conv_unet(3, 6)}
    for name, settings in LIGHT.items():
        networks[name] = create_network(
            "lightm_unet", spatial_dims=3, input_channels=1, num_classes=CLASSES, **settings
        )
    runs = {name: forward(network, x) for name, network in networks.items()}
    changes = {"no scan": without_scan, "not in blocks": not_in_blocks}
    changed = {f"{name}, {label}": change(runs[name]) for name in LIGHT for label, change in changes.items()}
    seconds = take_turns({**runs, **changed}, repeats)
    base = seconds[BASELINE]
    rows = rows_of("forward", {name: seconds[name] for name in networks}, networks, x, base)
    for label in changes:
        rows += rows_of(f"forward, {label}", {name: seconds[f"{name}, {label}"] for name in LIGHT}, networks, x, base)

    rate = 262144 * 64 * 256 / min(take_turns({"rate": one_product(262144, 64, 256)}, repeats)["rate"])
    for name in LIGHT:
        shapes = products(networks[name], x)
        macs = sum(rows * inputs * outputs for rows, inputs, outputs in shapes)
        of_layers = layers(networks[name], x)
        floor = {
            "products": total(one_product, shapes),
            "products at the rate of (262144, 64) x (64, 256)": macs / rate,
            "convolutions": total(one_convolution, [(tokens, 2 * channels) for tokens, channels in of_layers]),
            "layer norms": 2 * total(one_layer_norm, of_layers),
        }
        for measurement, seconds_taken in floor.items():
            rows += rows_of(measurement, {name: [seconds_taken]}, networks, x, base)

    widest = next(iter(LIGHT))
    start = time.perf_counter()
    with_published_scan(runs[widest])()
    return rows + rows_of("forward, published scan", {widest: [time.perf_counter() - start]}, networks, x, base)


def measure_training(repeats: int) -> list[dict[str, Any]]:
    """LightM-UNet's training step at the patch of nnU-Net's plan for the hippocampus."""
    x = torch.randn(2, 1, 40, 56, 40)
    networks: dict[str, nn.Module] = {BASELINE: plain_conv_unet(3, 4)}
    for name, settings in LIGHT.items():
        networks[name] = create_network(
            "lightm_unet", spatial_dims=3, input_channels=1, num_classes=CLASSES, **settings
        )
    seconds = take_turns({name: training_step(network, x) for name, network in networks.items()}, repeats)
    return rows_of("training step", seconds, networks, x, seconds[BASELINE])


def measure(names: Sequence[str], patch: Sequence[int], batch: int, train: bool, repeats: int) -> list[dict[str, Any]]:
    """Networks given on the command line."""
    x = torch.randn(batch, 1, *patch)
    networks: dict[str, nn.Module] = {BASELINE: plain_conv_unet(len(patch), stages_of(patch))}
    for name in names:
        network, _, settings = name.partition(":")
        pairs = (setting.partition("=") for setting in settings.split(",") if setting)
        networks[name] = create_network(
            network,
            spatial_dims=len(patch),
            input_channels=1,
            num_classes=CLASSES,
            **{key: json.loads(value) for key, _, value in pairs},
        )
    step = training_step if train else forward
    seconds = take_turns({name: step(network, x) for name, network in networks.items()}, repeats)
    return rows_of("training step" if train else "forward", seconds, networks, x, seconds[BASELINE])


def machine() -> dict[str, str]:
    """What the times depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "threads": str(torch.get_num_threads()),
        "scan": f"native, {instruction_sets()[0]}" if available_backends()["native"] is None else "torch",
        "processor": name or platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def write_page(results: Path) -> None:
    """Put what is recorded on the page, as multiples of the baseline's time, and name the machine."""
    recorded = read_rows(results)
    times: dict[str, dict[str, str]] = {}
    for row in recorded:
        if row["network"] != BASELINE and row["measurement"].startswith(("forward", "training step")):
            times.setdefault(row["measurement"], {})[row["network"]] = row[f"times {BASELINE}"]
    rows = [{f"times {BASELINE}": measurement, **of_networks} for measurement, of_networks in times.items()]
    about = "; ".join(f"{key}: {recorded[0][key]}" for key in machine())
    write_table(PAGE, Path(__file__).name, [about, "", *markdown((f"times {BASELINE}", *LIGHT), rows)])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--network", action="append", default=[], help="NAME or NAME:SETTING=VALUE,...; repeatable")
    parser.add_argument("--patch", type=int, nargs="+", default=[64, 64, 64], help="size in voxels, 2 or 3 numbers")
    parser.add_argument("--batch", type=int, default=1, help="patches at once")
    parser.add_argument("--train", action="store_true", help="training steps instead of forward passes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.network:
        rows = measure(arguments.network, arguments.patch, arguments.batch, arguments.train, arguments.repeats)
    else:
        rows = measure_forward(arguments.repeats) + measure_training(arguments.repeats)
        with RESULTS.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, [*ROW, *machine()])
            writer.writeheader()
            writer.writerows({**row, **machine()} for row in rows)
        write_page(RESULTS)
    widths = [max(len(str(row[column])) for row in [dict(zip(ROW, ROW, strict=True)), *rows]) for column in ROW]
    for row in [dict(zip(ROW, ROW, strict=True)), *rows]:
        print("  ".join(str(row[column]).ljust(width) for column, width in zip(ROW, widths, strict=True)))


if __name__ == "__main__":
    main()
