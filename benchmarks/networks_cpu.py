"""Seconds per forward pass and per training step on this machine's CPU, beside nnU-Net's own network.

    python benchmarks/networks_cpu.py [--threads 2] [--repeats 7]

measures what LightM-UNet's time is made of, beside nnU-Net's PlainConvUNet, and writes
``benchmarks/results/networks_cpu.csv``. How the trainers' networks compare as nnU-Net plans them is in trainers_cpu.py.

- ``forward``: a patch of 64x64x64, no gradients, PlainConvUNet with 6 stages (32 to 320 features);
- ``forward, not in blocks``: the same with every Mamba layer computed step by step for all tokens at once;
- ``forward, published scan``: the same for all tokens at once, with the scan as published networks run it without a GPU
  (published_scan.py; once; about a minute, and some GB);
- ``forward, no scan``: the same by torch's steps with the scan left out, which shows what the rest costs;
- ``products``: the matrix products of that forward pass alone, with results written into mapped memory, each at its
  own shape; and ``products at the rate of (262144, 64) x (64, 256)``. No forward pass can take less;
- ``convolutions`` (causal, with SiLU) and ``layer norms``: the same for the steps that cost most beside them. These,
  the products and the scan together are the floor of a network that runs step by step, whatever calls the steps;
- ``training step``: forward, cross-entropy and backward of two patches of 40x56x40, PlainConvUNet with 4 stages.

Networks take turns, so that a busy moment of the machine hits them alike; ratios are medians of the ratios of one turn.
Any other network and patch is measured by ``nnUNetv2_lightnets benchmark``. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from published_scan import use_published_scan
from recording import (
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
    take_turns,
)
from torch import Tensor, nn

from nnunetv2_lightnets import create_network
from nnunetv2_lightnets.networks import lightm_unet, mamba
from nnunetv2_lightnets.ops import available_backends, causal_conv1d
from nnunetv2_lightnets.ops.mamba_layer import by_torch, native
from nnunetv2_lightnets.ops.native_library import instruction_sets

CLASSES = 3
MEASURED = RESULTS / "networks_cpu.csv"
PAGE = "docs/lightm_unet.md"
BASELINE = "PlainConvUNet"
TRAINERS = {32: "nnUNetTrainerLightMUNet", 16: "nnUNetTrainerLightMUNetS", 8: "nnUNetTrainerLightMUNetT"}
LIGHT = {f"lightm_unet, width {width}": {"width": width} for width in TRAINERS}
FORWARD = "forward"
FACTS = ("threads", "processor", "torch")


def plain_conv_unet(spatial_dims: int, stages: int, channels: int = 1, classes: int = CLASSES) -> nn.Module:
    """What nnU-Net plans: two convolutions per stage, instance norm, leaky ReLU."""
    most = 320 if spatial_dims == 3 else 512
    return PlainConvUNet(
        channels,
        stages,
        [min(32 * 2**stage, most) for stage in range(stages)],
        nn.Conv3d if spatial_dims == 3 else nn.Conv2d,
        3,
        [1] + [2] * (stages - 1),
        2,
        classes,
        2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d if spatial_dims == 3 else nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


def light(width: int) -> nn.Module:
    """LightM-UNet in 3D."""
    return create_network("lightm_unet", spatial_dims=3, input_channels=1, num_classes=CLASSES, width=width)


# ---- What is timed ----


def forward(network: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A forward pass without gradients."""

    def run() -> None:
        with torch.inference_mode():
            network(x)

    network.eval()
    return run


def training_step(network: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Forward, cross-entropy, backward, of a copy."""
    network = copy.deepcopy(network).train()
    target = torch.randint(2, (x.shape[0], *x.shape[2:]))

    def run() -> None:
        network.zero_grad()
        F.cross_entropy(network(x), target).backward()

    return run


def skip_scan(scan: by_torch._Scan, save: bool) -> tuple[Tensor, Tensor, tuple[()]]:
    """In the place of the scan: its input, and a state of zeros."""
    u, _, A, *_ = scan.fields
    return u.transpose(1, 2), A.new_zeros(u.shape[0], *A.shape), ()


@contextmanager
def without_scan() -> Iterator[None]:
    """Scans are left out."""
    no_kernel = mock.patch.object(native, "takes", lambda layer: False)  # it does not come apart
    with no_kernel, mock.patch.object(by_torch._Scan, "forward", skip_scan):
        yield


@contextmanager
def not_in_blocks() -> Iterator[None]:
    """All tokens are computed at once, and every step is a call of its own."""
    layer, norms = lightm_unet.MambaLayer, mock.patch.object(lightm_unet, "computes_in_blocks", lambda tokens: False)
    with norms, mock.patch.object(layer, "forward", layer.plain):
        yield


def changed(run: Callable[[], Any], *contexts: Callable[[], AbstractContextManager[Any]]) -> Callable[[], Any]:
    """The same within contexts."""

    def run_changed() -> None:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            run()

    return run_changed


def calls(network: nn.Module, x: Tensor, kind: type[nn.Module]) -> list[tuple[nn.Module, torch.Size, torch.Size]]:
    """Each module of a kind that a forward pass of the whole patch calls, with the shapes of its input and output."""
    found: list[tuple[nn.Module, torch.Size, torch.Size]] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, out: found.append((module, inputs[0].shape, out.shape)))
        for module in network.modules()
        if isinstance(module, kind)
    ]
    with not_in_blocks():
        network.eval()(x)
    for hook in hooks:
        hook.remove()
    return found


def products(network: nn.Module, x: Tensor) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs of each matrix product of a forward pass of the whole patch."""
    linears = calls(network, x, nn.Linear)
    found = [(out.numel() // out[-1], inputs[-1], out[-1]) for _, inputs, out in linears]
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


# ---- Timing ----


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
            f"times {BASELINE}": f"{median_ratio(values, base):.3g}",
        }
        for name, values in seconds.items()
    ]


def measure_forward(repeats: int) -> list[dict[str, Any]]:
    """LightM-UNet's forward pass, what it is made of, and its floor."""
    x = torch.randn(1, 1, 64, 64, 64)
    networks = {BASELINE: plain_conv_unet(3, 6)} | {name: light(**settings) for name, settings in LIGHT.items()}
    runs = {name: forward(network, x) for name, network in networks.items()}
    changes = {"no scan": without_scan, "not in blocks": not_in_blocks}
    more = {f"{name}, {label}": changed(runs[name], change) for name in LIGHT for label, change in changes.items()}
    seconds = take_turns(runs | more, repeats)
    base = seconds[BASELINE]
    rows = rows_of("forward", {name: seconds[name] for name in networks}, networks, x, base)
    for label in changes:
        rows += rows_of(f"forward, {label}", {name: seconds[f"{name}, {label}"] for name in LIGHT}, networks, x, base)

    rate = 262144 * 64 * 256 / min(take_turns({"rate": one_product(262144, 64, 256)}, repeats)["rate"])
    for name in LIGHT:
        shapes = products(networks[name], x)
        macs = sum(rows * inputs * outputs for rows, inputs, outputs in shapes)
        of_layers = [
            (shape[0] * shape[1], shape[2]) for _, shape, _ in calls(networks[name], x, lightm_unet.MambaLayer)
        ]
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
    changed(runs[widest], not_in_blocks, use_published_scan)()
    return rows + rows_of("forward, published scan", {widest: [time.perf_counter() - start]}, networks, x, base)


def measure_training(repeats: int) -> list[dict[str, Any]]:
    """LightM-UNet's training step at the patch of nnU-Net's plan for the hippocampus."""
    x = torch.randn(2, 1, 40, 56, 40)
    networks = {BASELINE: plain_conv_unet(3, 4)} | {name: light(**settings) for name, settings in LIGHT.items()}
    seconds = take_turns({name: training_step(network, x) for name, network in networks.items()}, repeats)
    return rows_of("training step", seconds, networks, x, seconds[BASELINE])


def tables() -> Tables:
    """What a forward pass takes without some of its parts or means, as multiples of itself."""
    recorded = read_rows(MEASURED)
    seconds = {(row["measurement"], row["network"]): float(row["median seconds"]) for row in recorded}
    rows: dict[str, dict[str, str]] = {}
    for name, settings in LIGHT.items():
        for measurement in dict.fromkeys(row["measurement"] for row in recorded):
            if (measurement, name) in seconds and measurement.startswith(f"{FORWARD},"):
                row = rows.setdefault(measurement, {"times the forward pass": measurement})
                ratio = seconds[measurement, name] / seconds[FORWARD, name]
                row[f"`{TRAINERS[settings['width']]}`"] = f"{short(ratio)}×"
    about = ", ".join(f"{fact} {recorded[0][fact]}" for fact in (*FACTS, "scan"))
    return {PAGE: [f"Measured with: {about}.", "", *table(list(rows.values())), "", link(PAGE, MEASURED)]}


def main() -> None:
    """Measure and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--out", type=Path, default=MEASURED)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    scan = f"native, {instruction_sets()[0]}" if available_backends()["native"] is None else "torch"
    record = Record(arguments.out, "measurement", "network")
    for rows in (measure_forward(arguments.repeats), measure_training(arguments.repeats)):
        record.put(*({**row, "scan": scan, **machine(*FACTS)} for row in rows))


if __name__ == "__main__":
    main()
