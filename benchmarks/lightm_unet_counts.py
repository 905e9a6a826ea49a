"""Where the numbers of LightM-UNet's paper come from.

    python benchmarks/lightm_unet_counts.py

writes ``benchmarks/results/lightm_unet_claims.csv``: the paper's numbers, each beside what the counter ``thop`` gives
and the true one of the network that was counted. What the published network has is counted by network_costs.py. Nothing
is computed: shapes alone are followed (device "meta"), so the numbers are the same on every machine.

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

from dataclasses import dataclass
from itertools import pairwise

import network_costs
import torch
from network_costs import BASELINE
from recording import RESULTS, Record, Tables, link, read_rows, table
from torch import Tensor, nn

from nnunetv2_lightnets.costs.trainers import find_trainer_class
from nnunetv2_lightnets.nnunet.plans import patch_setting

CLAIMS = RESULTS / "lightm_unet_claims.csv"
PAGE = "docs/lightm_unet.md"
LIGHT = "nnUNetTrainerLightMUNet"
WIDTH, BLOCKS = 32, (1, 2, 2, 4)
QUANTITIES = (
    "million parameters",
    "'GFLOPs' (true: GMACs of one image)",
    "nnU-Net's parameters, times",
    "nnU-Net's operations, times",
)
COLUMNS = ("quantity", "paper", "by thop", "true, network counted", "by thop, network published")
SHOWN = 6  # rows on the page: all in 3D, and the network's own in 2D


@dataclass(frozen=True)
class Counts:
    """Parameters, and MACs."""

    parameters: int
    macs: int


@dataclass(frozen=True)
class Setting:
    """A data set of the paper: channels, classes, patch, batch."""

    inputs: int
    classes: int
    patch: tuple[int, ...]
    batch: int

    def image(self, batch: int = 1) -> Tensor:
        """Shape and type of a batch, without values."""
        return torch.empty(batch, self.inputs, *self.patch, device="meta")


LITS = Setting(1, 3, (128, 128, 128), 2)
LUNG = Setting(3, 2, (512, 512), 12)
PAPER = {LITS: ("1.87", "457.62", "47.39", "15.82"), LUNG: ("1.09", "267.19", "116", "21")}


# ---- What is there ----


def true_counts(trainer: str, setting: Setting) -> Counts:
    """As network_costs.py has recorded them."""
    size = network_costs.shown_input(setting.patch, setting.inputs, setting.classes)
    return Counts(*network_costs.counts()[trainer, size])


def nnunet(setting: Setting) -> nn.Module:
    """The network that nnU-Net plans for these patches."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(patch_setting(setting.patch, setting.inputs, setting.classes).plans)
    (name,) = plans.available_configurations
    build = find_trainer_class(BASELINE).build_network_architecture
    with torch.device("meta"):
        return build(plans, plans.get_configuration(name), setting.inputs, setting.classes, False)


@dataclass(frozen=True)
class Level:
    """One resolution of the network: stage, channels, voxels of one image."""

    stage: int
    channels: int
    voxels: int


def levels(setting: Setting) -> list[Level]:
    voxels = torch.Size(setting.patch).numel()
    return [Level(i, WIDTH * 2**i, voxels // 2 ** (i * len(setting.patch))) for i in range(len(BLOCKS))]


def convolutions(setting: Setting, published: bool) -> Counts:
    """Stem, residual blocks of the decoder and head, where the network the paper counted was another."""
    taps = 3 ** len(setting.patch)
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
    whole = true_counts(LIGHT, setting)
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
        if len(setting.patch) == 2:
            macs += 11 * fine.channels * fine.voxels
    return Counts(parameters, macs * setting.batch)


# ---- Tables ----


def quantities(network: Counts, base: Counts | None) -> tuple[str, str, str, str]:
    """What the paper gives of a network, and of nnU-Net's beside it."""
    own = (f"{network.parameters / 1e6:.3f}", f"{network.macs / 1e9:.2f}")
    if base is None:
        return *own, "", ""
    return *own, f"{base.parameters / network.parameters:.2f}", f"{base.macs / network.macs:.2f}"


def claims() -> list[dict[str, str]]:
    """A row for each of the paper's numbers."""
    rows = []
    for setting, paper in PAPER.items():
        base = as_thop(nnunet(setting), setting.image(setting.batch))
        columns = (
            [f"{len(setting.patch)}D {quantity}" for quantity in QUANTITIES],
            paper,
            quantities(light_as_thop(setting, False), base),
            quantities(before_the_fix(setting), true_counts(BASELINE, setting)),
            quantities(light_as_thop(setting, True), None),
        )
        rows += [dict(zip(COLUMNS, values, strict=True)) for values in zip(*columns, strict=True)]
    return rows


def tables() -> Tables:
    """The paper's numbers beside the true ones of the published network, as network_costs.py has counted it."""
    true = [value for one in PAPER for value in quantities(true_counts(LIGHT, one), true_counts(BASELINE, one))]
    rows = [
        {column: row[column] for column in COLUMNS[:-1]} | {"true, network published": f"**{value}**"}
        for row, value in zip(read_rows(CLAIMS), true, strict=True)
    ]
    return {PAGE: [*table(rows[:SHOWN]), "", link(PAGE, CLAIMS)]}


def main() -> None:
    """Count."""
    Record(CLAIMS, "quantity").put(*claims())


if __name__ == "__main__":
    main()
