"""Milliseconds of U-Lite and UltraLightUNet on this machine's CPU, beside nnU-Net's own network.

    python benchmarks/light_cnns_cpu.py [--threads 2] [--turns 15]

writes ``benchmarks/results/light_cnns_cpu.csv`` (``--out`` another). How the trainers' networks compare as nnU-Net
plans them is in trainers_cpu.py. Measured are one image of 3x256x256, one volume of 1x64x64x64, and for each:

- ``PlainConvUNet``: nnU-Net's network with 6 stages (2D: 32 to 512 features, 3D: 32 to 320), and the same with its
  channels last in memory;
- ``as published``: the network in the order of its authors' code, channels first: one-voxel kernels as convolutions,
  channels shuffled, heads that nothing reads; in 3D the lift of it;
- ``network``: this package's, as it trains;
- ``prepared``: the same by ``prepare_for_inference``; with variants that its choices were made against: ``channels
  first``, and U-Lite's ``one kernel of 7x7`` instead of two axial ones;
- ``floor``: the sum over the prepared network's steps of the least time that each takes alone, again and again, with
  its operands in either memory format. What runs step by step cannot take less.

``training step`` is forward, cross-entropy and backward, of two images or one volume.

All take turns, so that a busy moment of the machine hits them alike; ratios are medians of the ratios of one turn. Run
it on a machine that does nothing else. Every variant is checked to compute the same before it is timed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from networks_cpu import BASELINE, forward, plain_conv_unet, training_step
from recording import (
    RESULTS,
    Record,
    Tables,
    argument_parser,
    link,
    machine,
    median_ratio,
    read_rows,
    table,
    take_turns,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from nnunetv2_lightnets import create_network
from nnunetv2_lightnets.networks import depthwise, layers, prepare_for_inference, ulite, ultralight_unet

PATCHES = {2: (3, 256, 256), 3: (1, 64, 64, 64)}
CLASSES = 2
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "U-Lite": ("ulite", {}),
    "UltraLightUNet base": ("ultralight_unet", {"variant": "base"}),
    "UltraLightUNet T": ("ultralight_unet", {"variant": "T"}),
}
GOALS = {  # times PlainConvUNet, prepared
    ("U-Lite", 2): 7,
    ("U-Lite", 3): 6,
    ("UltraLightUNet base", 2): 8,
    ("UltraLightUNet base", 3): 8,
    ("UltraLightUNet T", 2): 15,
    ("UltraLightUNet T", 3): 15,
}
GOAL_AS_PUBLISHED = 2  # times the network as published, prepared
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
MEASURED = RESULTS / "light_cnns_cpu.csv"
PAGE = "docs/ultralight_unet.md"
FACTS = ("processor", "cores", "threads", "system", "torch")
LEAST_OF = 15  # repetitions of a step alone


# ---- The networks in their authors' order ----


@contextmanager
def torchs_own() -> Iterator[None]:
    """Layers compute as on other devices than a CPU: by torch's own steps, in the memory format that comes."""

    def never(x: Tensor) -> bool:
        return False

    with mock.patch.object(layers, "on_cpu", never), mock.patch.object(depthwise, "on_cpu", never):
        yield


class ChannelsFirst(nn.Module):
    """A network that leaves the memory format as it is, with weights that ask for none."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        for parameter in self.network.parameters():
            parameter.data = parameter.data.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Logits for ``x``."""
        with (
            mock.patch.object(ulite, "channels_last_on_cpu", lambda x: x),
            mock.patch.object(ultralight_unet, "channels_last_on_cpu", lambda x: x),
        ):
            return cast(Tensor, self.network(x))


class ULiteAsPublished(ChannelsFirst):
    """U-Lite: what is upsampled and the skip connection are laid side by side."""

    @torchs_own()
    def forward(self, x: Tensor) -> Tensor:
        """Logits for ``x``."""
        network = self.network
        pool = F.max_pool2d if x.ndim == 4 else F.max_pool3d
        x, skips = network.stem(x), []
        for stage in network.encoder:
            skips.append(stage.norm(stage.axial(x)))
            x = F.gelu(pool(stage.pointwise(skips[-1]), 2))
        x = network.bottleneck(x)
        for stage in network.decoder.stages:
            x = stage.norm(stage.reduce(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], dim=1)))
            x = F.gelu(stage.pointwise(stage.axial(x)))
        return cast(Tensor, network.decoder.seg_layers[0](x))


class UltraLightUNetAsPublished(ChannelsFirst):
    """UltraLightUNet: one-voxel kernels are convolutions, channels are shuffled, and heads are computed for nobody."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        channels = [stage.block.project.out_channels for stage in self.network.decoder.stages]
        convolution = type(self.network.decoder.seg_layers[0])
        self.dead_heads = nn.ModuleList(convolution(c, CLASSES, 1) for c in channels[1:4])
        for block in self.network.modules():
            if isinstance(block, ultralight_unet.MultiKernelBlock):
                block.forward = lambda x, block=block: _block_as_published(block, x)  # type: ignore[method-assign]

    @torchs_own()
    def forward(self, x: Tensor) -> Tensor:
        """Logits for ``x``."""
        network, mode = self.network, "bilinear" if x.ndim == 4 else "trilinear"
        pool = F.max_pool2d if x.ndim == 4 else F.max_pool3d
        skips = []
        for stage in network.encoder:
            x = pool(stage(x), 2, 2)
            skips.append(x)
        decoder = network.decoder
        for level, (stage, skip) in enumerate(zip(decoder.stages, [*reversed(skips[:-1]), None], strict=True)):
            x = stage.attention(x) * x
            x = decoder.spatial_attention(x) * x
            x = F.relu(F.interpolate(stage.block(x), scale_factor=2, mode=mode))
            if 1 <= level <= 3:
                F.interpolate(self.dead_heads[level - 1](x), scale_factor=2 ** (4 - level), mode=mode)
            if skip is not None:
                x = x + stage.gate(x, skip)
        return cast(Tensor, decoder.seg_layers[0](x))


def _block_as_published(block: Any, x: Tensor) -> Tensor:
    hidden = F.relu6(block.expand_norm(block.expand(x)), inplace=True)
    mixed: Tensor | float = 0.0
    for branch in block.branches:
        mixed = mixed + F.relu6(branch.norm(branch.convolution(hidden)), inplace=True)
    assert isinstance(mixed, Tensor)
    batch, channels, *spatial = mixed.shape
    mixed = mixed.view(batch, block.groups, channels // block.groups, *spatial).transpose(1, 2).contiguous()
    out = block.project_norm(block.project(mixed.view(batch, channels, *spatial)))
    return cast(Tensor, block.shortcut(x) + out)


def with_one_kernel(network: nn.Module) -> nn.Module:
    """U-Lite prepared with all its axial kernels merged, as for another device than a CPU."""
    with torch.no_grad(), mock.patch.object(ulite, "WIDEST_MERGED_ON_CPU", 7):
        return prepare_for_inference(network)


def variants(label: str, spatial_dims: int) -> dict[str, nn.Module]:
    """All ways to compute one network, with running statistics that are not trivial."""
    name, settings = NETWORKS[label]
    network = create_network(
        name, spatial_dims=spatial_dims, input_channels=PATCHES[spatial_dims][0], num_classes=CLASSES, **settings
    )
    for norm in network.modules():
        if isinstance(norm, layers.BatchNorm):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    network.eval()
    prepared = prepare_for_inference(network)
    published = ULiteAsPublished if name == "ulite" else UltraLightUNetAsPublished
    found: dict[str, nn.Module] = {
        "as published": published(network),
        "network": network,
        "prepared": prepared,
        "prepared, channels first": ChannelsFirst(prepared),
    }
    if name == "ulite" and spatial_dims == 2:
        found["prepared, one kernel of 7x7"] = with_one_kernel(network)
    x = torch.randn(1, *PATCHES[spatial_dims])
    with torch.inference_mode():
        expected = network(x)
        for way, candidate in found.items():
            torch.testing.assert_close(candidate.eval()(x), expected, rtol=0, atol=1e-4, msg=f"{label}: {way}")
    return found


# ---- What is timed ----


class _Steps(TorchDispatchMode):
    """Times each step alone, as often as LEAST_OF, in either memory format, and sums the least times."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.milliseconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        least = []
        if func.is_view:  # takes no time, and is one in its own memory format only
            return func(*args, **kwargs)
        for memory_format in (torch.contiguous_format, CHANNELS_LAST[self.spatial_dims]):

            def in_format(leaf: Any, memory_format: torch.memory_format = memory_format) -> Any:
                if isinstance(leaf, Tensor):
                    whole = leaf.ndim == self.spatial_dims + 2
                    return leaf.clone(memory_format=memory_format) if whole else leaf.clone()
                return leaf

            own_args, own_kwargs = tree_map(in_format, args), tree_map(in_format, kwargs)
            times = []
            for _ in range(LEAST_OF):
                start = time.perf_counter()
                func(*own_args, **own_kwargs)
                times.append(time.perf_counter() - start)
            least.append(min(times))
        self.milliseconds += min(least) * 1e3
        return func(*args, **kwargs)


def floor(network: nn.Module, x: Tensor) -> float:
    """The sum of the least milliseconds of each of the network's steps."""
    with torch.no_grad(), _Steps(x.ndim - 2) as steps:
        network(x)
    return steps.milliseconds


# ---- The table ----


def rows_of(
    measurement: str, patch: Sequence[int], times: dict[tuple[str, str], list[float]], parameters: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """One row for each way to compute each network."""
    for (label, way), seconds in times.items():
        row: dict[str, Any] = {
            "measurement": measurement,
            "patch": "x".join(map(str, patch)),
            "network": label,
            "computed": way,
            "parameters": parameters[label],
            "median ms": f"{1e3 * statistics.median(seconds):.3g}",
            "least ms": f"{1e3 * min(seconds):.3g}",
            f"times {BASELINE}": f"{median_ratio(times[BASELINE, 'network'], seconds):.1f}",
        }
        if label != BASELINE:
            row["times as published"] = f"{median_ratio(times[label, 'as published'], seconds):.1f}"
        if measurement == "forward" and way == "prepared":
            row["goals"] = f"{GOALS[label, len(patch) - 1]} and {GOAL_AS_PUBLISHED}"
        yield row


def measure(spatial_dims: int, turns: int) -> Iterator[dict[str, Any]]:
    """All rows of one number of dimensions."""
    patch = PATCHES[spatial_dims]
    x = torch.randn(1, *patch)
    plain = plain_conv_unet(spatial_dims, 6, patch[0], CLASSES).eval()
    plain_last = copy.deepcopy(plain).to(memory_format=CHANNELS_LAST[spatial_dims])  # type: ignore[call-overload]
    x_last = x.clone(memory_format=CHANNELS_LAST[spatial_dims])
    ways = {label: variants(label, spatial_dims) for label in NETWORKS}
    parameters = {label: sum(p.numel() for p in found["network"].parameters()) for label, found in ways.items()}
    parameters[BASELINE] = sum(p.numel() for p in plain.parameters())

    runs = {(BASELINE, "network"): forward(plain, x), (BASELINE, "channels last"): forward(plain_last, x_last)}
    runs |= {(label, way): forward(net, x) for label, found in ways.items() for way, net in found.items()}
    yield from rows_of("forward", patch, take_turns(runs, turns), parameters)
    for label, found in ways.items():
        row = {"measurement": "floor", "patch": "x".join(map(str, patch)), "network": label, "computed": "prepared"}
        yield row | {"least ms": f"{floor(found['prepared'], x):.3g}", "parameters": parameters[label]}

    x = torch.randn(4 - spatial_dims, *patch)
    steps = {(BASELINE, "network"): training_step(plain, x)}
    for label, found in ways.items():
        steps |= {(label, way): training_step(found[way], x) for way in ("as published", "network")}
    yield from rows_of("training step", patch, take_turns(steps, max(3, turns // 5)), parameters)


def tables() -> Tables:
    """What preparing gains on the network as its authors wrote it, and how far it is from its floor."""
    recorded = read_rows(MEASURED)
    by_name = {(row["measurement"], row["patch"], row["network"], row["computed"]): row for row in recorded}
    rows = []
    for patch in dict.fromkeys(row["patch"] for row in recorded):
        for label in NETWORKS:
            ways = ("as published", "network", "prepared")
            published, network, prepared = (by_name["forward", patch, label, way] for way in ways)
            step = by_name["training step", patch, label, "network"]
            row = {"network": label, "input": patch.replace("x", "×"), "as published (ms)": published["median ms"]}
            faster = {"as it trains": network, "prepared": prepared, "training step": step}
            row |= {f"{what}, times as fast": measured["times as published"] for what, measured in faster.items()}
            rows.append(row | {"floor (ms)": by_name["floor", patch, label, "prepared"]["least ms"]})
    about = ", ".join(f"{fact} {recorded[0][fact]}" for fact in FACTS)
    return {PAGE: [f"Measured with: {about}.", "", *table(rows), "", link(PAGE, MEASURED, "All variants")]}


def main() -> None:
    """Measure and record."""
    parser = argument_parser(__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--turns", type=int, default=15, help="timed turns")
    parser.add_argument("--dims", type=int, nargs="+", choices=(2, 3), default=[2, 3], help="images, volumes or both")
    parser.add_argument("--out", type=Path, default=MEASURED)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    record = Record(arguments.out, "measurement", "patch", "network", "computed")
    for spatial_dims in arguments.dims:
        for row in measure(spatial_dims, arguments.turns):
            record.put(row | machine(*FACTS))


if __name__ == "__main__":
    main()
