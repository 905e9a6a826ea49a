"""Multiply-accumulates (MACs) of Swin-UMamba and Swin-UMamba† as the papers count them, also of the first version.

    python benchmarks/swin_umamba_counts.py

writes ``benchmarks/results/swin_umamba_counts.csv``. What we count is in network_costs.py. Nothing is computed: shapes
alone are followed (device "meta"), so the numbers are the same on every machine.

The papers' numbers come from fvcore, which takes one MAC per multiply-add of convolutions and matrix products,
4 operations per value of an instance norm (5 with weight and bias) and 5 per value of a layer norm, and from one of
two formulas for the selective scan over L tokens of D channels with N states each, for each direction:

- ``vmamba``: 3.5 L D N + L D. What VMamba's ``flops_selective_scan_ref`` gives; the first version of the paper.
- ``9LDN``: 9 L D N + L D. What mamba's authors propose (state-spaces/mamba issue 110); the later version.

``ours`` is what PyTorch's ``FlopCounterMode`` gives (halved), with this package's formula for the scan and without
norms; here with the heads of deep supervision, which the papers count and network_costs.py does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from recording import RESULTS, Record, Tables, link, read_rows, table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_lightnets import create_network
from nnunetv2_lightnets.networks.vss import DIRECTIONS, SS2D
from nnunetv2_lightnets.ops.flops import register_flop_formulas

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "Swin-UMamba": ("swin_umamba", {}),
    "Swin-UMamba, first version": ("swin_umamba", {"bottleneck_decoder": False}),
    "Swin-UMamba†": ("swin_umamba_d", {}),
}
IMAGES = {  # of the paper's data sets: input channels, height, width, classes
    "AbdomenMRI": (1, 320, 320, 14),
    "Endoscopy": (3, 384, 640, 8),
    "Microscopy": (3, 512, 512, 3),
}
COUNTS = RESULTS / "swin_umamba_counts.csv"
PAGE = "docs/swin_umamba.md"
SCANS = {"published GMACs, scan 9LDN": "9 L D N", "published GMACs, scan vmamba": "3.5 L D N, as VMamba"}
PRINTED = ("68.0", "163.6", "174.4", "58.4", "18.9", "45.3", "48.2", "15.0")  # by one of the papers' versions


@dataclass(frozen=True)
class Counts:
    """MACs by kind: products (convolutions, matrix products), norms, and what the scan's formulas are made of."""

    products: float
    norms: float
    scan_ours: float
    scan_states: float  # L D N, summed over scans and directions
    scan_channels: float  # L D

    def total(self, scan: str) -> float:
        """MACs under one way of counting the scan: "none", "vmamba", "9LDN" (with norms), or "ours" (without)."""
        if scan == "ours":
            return self.products + self.scan_ours
        states, channels = {"none": (0, 0), "vmamba": (3.5, 1), "9LDN": (9, 1)}[scan]
        return self.products + self.norms + states * self.scan_states + channels * self.scan_channels

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))


class _NormCounter(TorchFunctionMode):
    """Counts norms as fvcore does."""

    total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm:
            self.total += 5 * args[0].numel()
        elif func is torch.instance_norm:
            self.total += (4 if args[1] is None else 5) * args[0].numel()
        return func(*args, **kwargs)


def count(module: nn.Module, *inputs: Tensor) -> Counts:
    """Counts of one forward pass of ``module``, which lies with its inputs on the device "meta"."""
    scans: list[tuple[int, int]] = []  # L D over all directions, N

    def note_scan(block: SS2D, arguments: tuple[Tensor]) -> None:
        tokens = arguments[0].numel() // arguments[0].shape[-1]
        scans.append((tokens * DIRECTIONS * block.out_proj.in_features, block.d_state))

    hooks = [m.register_forward_pre_hook(note_scan) for m in module.modules() if isinstance(m, SS2D)]
    register_flop_formulas()
    norms, flops = _NormCounter(), FlopCounterMode(display=False)
    with torch.no_grad(), norms, flops:
        module(*inputs)
    for hook in hooks:
        hook.remove()
    by_operator = flops.get_flop_counts()["Global"]
    scan = sum(value for operator, value in by_operator.items() if "selective_scan" in str(operator))
    return Counts(
        products=(flops.get_total_flops() - scan) / 2,
        norms=norms.total,
        scan_ours=scan / 2,
        scan_states=sum(channels * states for channels, states in scans),
        scan_channels=sum(channels for channels, _ in scans),
    )


def network_counts(label: str, image: str) -> tuple[int, Counts, Counts]:
    """Parameters, the counts of what is computed, and the counts as published.

    They differ for the first version only: its encoder's last stage is used by nothing. The authors' code computes
    it, and fvcore's trace holds it up to its last scan (what follows is dropped as dead code); ours leaves it out.
    """
    name, architecture = NETWORKS[label]
    channels, height, width, classes = IMAGES[image]
    with torch.device("meta"):
        network = create_network(
            name, spatial_dims=2, input_channels=channels, num_classes=classes, deep_supervision=True, **architecture
        ).eval()
        computed = count(network, torch.empty(1, channels, height, width))
        published = computed
        if architecture.get("bottleneck_decoder") is False:
            merging, stage = network.vssm_encoder.downsamples[-1], network.vssm_encoder.layers[-1]
            tokens = torch.empty(1, height // 32, width // 32, stage.blocks[-1].self_attention.out_proj.in_features)
            published += count(merging, torch.empty(1, height // 16, width // 16, merging.reduction.in_features // 4))
            published += count(stage, tokens[..., : merging.reduction.out_features])
            dropped = count(
                nn.Sequential(stage.blocks[-1].self_attention.out_norm, stage.blocks[-1].self_attention.out_proj),
                tokens,
            )
            published += Counts(-dropped.products, -dropped.norms, 0, 0, 0)
    return sum(p.numel() for p in network.parameters()), computed, published


def tables() -> Tables:
    """A row for each network and way to count its scan, a column for each data set; bold is what a paper prints."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for recorded in read_rows(COUNTS):
        millions = f"{int(recorded['parameters']) / 1e6:.1f}"
        for column, way in SCANS.items():
            row = rows.setdefault(
                (recorded["network"], way),
                {"network": recorded["network"], "parameters (M)": millions, "scan counted as": way},
            )
            channels, _, size = recorded["input"].partition("x")
            gmacs = f"{float(recorded[column]):.1f}"
            title = f"{recorded['data set']}, {size.replace('x', '×')}, {channels}→{recorded['classes']}"
            row[title] = f"**{gmacs}**" if gmacs in PRINTED else gmacs
    return {PAGE: [*table(list(rows.values())), "", link(PAGE, COUNTS, "Also without the scan")]}


def main() -> None:
    """Count."""
    record = Record(COUNTS, "network", "data set")
    for label in NETWORKS:
        for image, (channels, height, width, classes) in IMAGES.items():
            parameters, computed, published = network_counts(label, image)
            record.put(
                {
                    "network": label,
                    "data set": image,
                    "input": f"{channels}x{height}x{width}",
                    "classes": classes,
                    "parameters": parameters,
                    "published GMACs, scan 9LDN": f"{published.total('9LDN') / 1e9:.3f}",
                    "published GMACs, scan vmamba": f"{published.total('vmamba') / 1e9:.3f}",
                    "published GMACs, without scan": f"{published.total('none') / 1e9:.3f}",
                    "our GMACs, all heads": f"{computed.total('ours') / 1e9:.3f}",
                }
            )


if __name__ == "__main__":
    main()
