"""True parameters and multiply-accumulates (MACs) of LightM-UNet, and where the paper's numbers come from.

    python benchmarks/lightm_unet_counts.py

writes ``benchmarks/results/lightm_unet_counts.csv`` (true counts) and ``lightm_unet_claims.csv`` (the paper's numbers,
each beside what the counter ``thop`` gives and the true one). Nothing is computed: shapes alone are followed (device
"meta"), so the numbers are the same on every machine.

The paper counted with thop, as its author says (https://github.com/MrBlankness/LightM-UNet/issues/9). Its rules, which
are repeated here:

- it counts a module when its ``forward`` is called. The fused Mamba kernel reads the weights of its projections
  without calling them, so all of Mamba counts as 0 parameters and 0 operations;
- a module that is registered under two names counts twice. nnU-Net's convolutions are (``.conv`` and
  ``.all_modules``), and its whole encoder is again (``encoder`` and ``decoder.encoder``). Operations are multiplied
  twice over, as the module is hooked as often;
- parameters outside modules it knows (group norm, scales) do not count; a layer or instance norm takes 4 operations
  per value, a bilinear upsampling 11, a trilinear one none, and a transposed convolution what a convolution with its
  output would;
- operations are MACs of the whole batch. The paper calls them FLOPs of the network.

And it counted another network: the code as it stood at commit b484335, before a fix, with ordinary 3x3(x3)
convolutions in stem and decoder where the published code has depthwise-separable ones.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_lightnets import create_network

WIDTH, BLOCKS = 32, (1, 2, 2, 4)
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Counts:
    """Parameters, and MACs."""

    parameters: int
    macs: int


@dataclass(frozen=True)
class Setting:
    """A data set of the paper: dimensions, channels, classes, patch, batch."""

    dims: int
    inputs: int
    classes: int
    patch: tuple[int, ...]
    batch: int

    def image(self, batch: int = 1) -> Tensor:
        """Shape and type of a batch, without values."""
        return torch.empty(batch, self.inputs, *self.patch, device="meta")


LITS = Setting(3, 1, 3, (128, 128, 128), 2)
LUNG = Setting(2, 3, 2, (512, 512), 12)


# ---- What is there ----


def true_counts(network: nn.Module, x: Tensor) -> Counts:
    """Every parameter once; MACs of one image by torch's counter and this package's formula for the scan."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network.eval()(x)
    return Counts(sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2)


def light(setting: Setting, width: int = WIDTH) -> nn.Module:
    with torch.device("meta"):
        return create_network(
            "lightm_unet",
            spatial_dims=setting.dims,
            input_channels=setting.inputs,
            num_classes=setting.classes,
            width=width,
        )


def nnunet(setting: Setting) -> nn.Module:
    """What nnU-Net plans for these patches: 6 stages up to 320 features in 3D, 8 up to 512 in 2D."""
    stages, most = (6, 320) if setting.dims == 3 else (8, 512)
    with torch.device("meta"):
        return PlainConvUNet(
            setting.inputs,
            stages,
            [min(32 * 2**stage, most) for stage in range(stages)],
            nn.Conv3d if setting.dims == 3 else nn.Conv2d,
            3,
            [1] + [2] * (stages - 1),
            2,
            setting.classes,
            2,
            conv_bias=True,
            norm_op=nn.InstanceNorm3d if setting.dims == 3 else nn.InstanceNorm2d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=False,
        )


@dataclass(frozen=True)
class Level:
    """One resolution of the network: stage, channels, voxels of one image."""

    stage: int
    channels: int
    voxels: int


def levels(setting: Setting) -> list[Level]:
    voxels = torch.Size(setting.patch).numel()
    return [Level(i, WIDTH * 2**i, voxels // 2 ** (i * setting.dims)) for i in range(len(BLOCKS))]


def convolutions(setting: Setting, published: bool) -> Counts:
    """Stem, residual blocks of the decoder and head, where the network the paper counted was another."""
    taps = 3**setting.dims
    finest, *_ = resolutions = levels(setting)
    if published:  # depthwise, then 1x1; the head's depthwise part has one tap
        stem = setting.inputs * taps + setting.inputs * finest.channels
        up = {level: taps * level.channels + level.channels**2 for level in resolutions[:-1]}
        head = finest.channels * (1 + setting.classes)
        biases = finest.channels + setting.classes
    else:
        stem = setting.inputs * finest.channels * taps
        up = {level: 2 * taps * level.channels**2 for level in resolutions[:-1]}
        head = finest.channels * setting.classes
        biases = setting.classes
    return Counts(
        stem + sum(up.values()) + head + biases,
        (stem + head) * finest.voxels + sum(weights * level.voxels for level, weights in up.items()),
    )


def before_the_fix(setting: Setting) -> Counts:
    """True counts of the network the paper counted: the published one with other convolutions, and 3 scales less."""
    whole = true_counts(light(setting), setting.image())
    published, ordinary = convolutions(setting, True), convolutions(setting, False)
    return Counts(
        whole.parameters - published.parameters + ordinary.parameters - 3, whole.macs - published.macs + ordinary.macs
    )


# ---- What thop sees ----


def operations_as_thop(module: nn.Module, out: Tensor) -> int | None:
    """What thop adds for one call of a module; None if it does not know such modules."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return out.numel() * module.in_channels // module.groups * torch.Size(module.kernel_size).numel()
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return 4 * out.numel()
    return None


def as_thop(network: nn.Module, x: Tensor) -> Counts:
    """What thop counts in a network of convolutions and instance norms."""
    own: dict[nn.Module, Counts] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        operations = operations_as_thop(module, out)
        if operations is not None:
            before = own.get(module, Counts(0, 0))
            own[module] = Counts(sum(p.numel() for p in module.parameters()), before.macs + operations)

    def hook(module: nn.Module) -> None:
        module.register_forward_hook(note)

    # thop walks the tree twice, and both times meets a module as often as it is registered: first to hook it, which
    # multiplies its operations, then to add up, which multiplies both.
    network.apply(hook)
    with torch.no_grad():
        network.eval()(x)

    def add_up(module: nn.Module) -> Counts:
        parts = [own[module]] if module in own else [add_up(child) for child in module.children()]
        return Counts(sum(p.parameters for p in parts), sum(p.macs for p in parts))

    return add_up(network)


def light_as_thop(setting: Setting, published: bool) -> Counts:
    """What thop counts in LightM-UNet with the fused Mamba kernel."""
    resolutions = levels(setting)
    per_image = convolutions(setting, published)
    parameters, macs = per_image.parameters, per_image.macs
    mamba_layers = [(level, level.channels) for level in resolutions for _ in range(2 * BLOCKS[level.stage])]
    mamba_layers += [(level, 2 * level.channels) for level in resolutions[:-1]]  # before the poolings
    for level, out_channels in mamba_layers:
        weights = level.channels * out_channels  # of the projection
        parameters += 2 * level.channels + weights + out_channels
        macs += (2 * 4 * level.channels + weights) * level.voxels  # the layer norm is called twice
    for fine, coarse in pairwise(resolutions):
        weights = coarse.channels * fine.channels  # of the 1x1 convolution before an upsampling
        parameters += weights
        macs += weights * coarse.voxels
        if setting.dims == 2:
            macs += 11 * fine.channels * fine.voxels
    return Counts(parameters, macs * setting.batch)


# ---- Tables ----


def true_table() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for setting in (LITS, LUNG):
        networks = {f"lightm_unet, width {width}": light(setting, width) for width in (32, 16, 8)}
        networks["nnU-Net (PlainConvUNet)"] = nnunet(setting)
        for name, network in networks.items():
            counts = true_counts(network, setting.image())
            rows.append(
                {
                    "network": name,
                    "input": "x".join(map(str, (setting.inputs, *setting.patch))),
                    "classes": setting.classes,
                    "parameters": counts.parameters,
                    "GMACs": f"{counts.macs / 1e9:.2f}",
                }
            )
    return rows


def claims_table() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []

    def add(quantity: str, paper: str, thop: float, counted: float, published: float, unit: float, digits: int) -> None:
        columns = {"by thop": thop, "true, network counted": counted, "true, network published": published}
        values = {column: f"{value / unit:.{digits}f}" for column, value in columns.items()}
        rows.append({"quantity": quantity, "paper": paper, **values})

    for setting, parameters, flops, fewer_parameters, fewer_flops in (
        (LITS, "1.87", "457.62", "47.39", "15.82"),
        (LUNG, "1.09", "267.19", "116", "21"),
    ):
        thop, published = light_as_thop(setting, False), true_counts(light(setting), setting.image())
        counted, base = before_the_fix(setting), true_counts(nnunet(setting), setting.image())
        base_thop = as_thop(nnunet(setting), setting.image(setting.batch))
        dims = f"{setting.dims}D"
        add(f"{dims} million parameters", parameters, *(c.parameters for c in (thop, counted, published)), 1e6, 3)
        add(f"{dims} 'GFLOPs' (true: GMACs of one image)", flops, *(c.macs for c in (thop, counted, published)), 1e9, 2)
        add(
            f"{dims} nnU-Net's parameters, times",
            fewer_parameters,
            base_thop.parameters / thop.parameters,
            base.parameters / counted.parameters,
            base.parameters / published.parameters,
            1,
            2,
        )
        add(
            f"{dims} nnU-Net's operations, times",
            fewer_flops,
            base_thop.macs / thop.macs,
            base.macs / counted.macs,
            base.macs / published.macs,
            1,
            2,
        )
        by_thop = light_as_thop(setting, True)
        rows[-4]["by thop, network published"] = f"{by_thop.parameters / 1e6:.3f}"
        rows[-3]["by thop, network published"] = f"{by_thop.macs / 1e9:.2f}"
    return rows


def write(name: str, rows: Sequence[dict[str, object]]) -> None:
    with (RESULTS / name).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Write both tables."""
    write("lightm_unet_counts.csv", true_table())
    write("lightm_unet_claims.csv", claims_table())


if __name__ == "__main__":
    main()
