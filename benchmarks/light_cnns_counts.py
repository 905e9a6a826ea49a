"""Parameters and multiply-accumulates of U-Lite and UltraLightUNet in 2D and 3D.

    python benchmarks/light_cnns_counts.py

writes ``benchmarks/results/light_cnns_counts.csv``, in seconds: nothing is computed, only counted. PyTorch's
``FlopCounterMode`` counts convolutions; UltraLightUNet's one-voxel kernels are multiplications here and are added, as
in the published code they are convolutions.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_lightnets import create_network
from nnunetv2_lightnets.networks.ultralight_unet import VARIANTS, DepthwiseBranch

PATCHES = ((3, 256, 256), (3, 352, 352), (1, 64, 64, 64), (1, 96, 96, 96), (3, 96, 96, 96))
NETWORKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ulite", {}),
    *(("ultralight_unet", {"variant": variant}) for variant in VARIANTS),
)


def counts(name: str, patch: tuple[int, ...], **settings: Any) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one patch (channels, *spatial), for one class."""
    with torch.device("meta"):
        network = create_network(
            name, spatial_dims=len(patch) - 1, input_channels=patch[0], num_classes=1, **settings
        ).eval()
        x = torch.empty(1, *patch)
    products: list[int] = []

    def note(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
        products.append(out.numel())

    for module in network.modules():
        if isinstance(module, DepthwiseBranch) and module.convolution.weight[0].numel() == 1:
            module.register_forward_hook(note)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x)
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2 + sum(products)


def main() -> None:
    """Write the table."""
    with (Path(__file__).parent / "results" / "light_cnns_counts.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("network", "variant", "patch", "parameters", "GMACs"))
        for name, settings in NETWORKS:
            for patch in PATCHES:
                parameters, macs = counts(name, patch, **settings)
                size = "x".join(map(str, patch))
                writer.writerow((name, settings.get("variant", ""), size, parameters, f"{macs / 1e9:.4g}"))


if __name__ == "__main__":
    main()
