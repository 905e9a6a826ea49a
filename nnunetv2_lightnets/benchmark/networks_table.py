"""``nnUNetv2_lightnets networks``: every trainer with its network and what that truly costs."""

from __future__ import annotations

import argparse

from nnunetv2_lightnets.errors import LightNetsError

DEFAULT_PATCH = {2: [512, 512], 3: [128, 128, 128]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments in nnU-Net's style."""
    parser.add_argument(
        "--patch",
        type=int,
        nargs="+",
        metavar="N",
        help="patch size in voxels, 2 or 3 numbers (default: both usual ones)",
    )
    parser.add_argument("--channels", type=int, default=1, help="input channels (default 1)")
    parser.add_argument("--classes", type=int, default=2, help="output classes, background included (default 2)")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if args.patch is not None and len(args.patch) not in (2, 3):
        raise LightNetsError(f"--patch takes 2 or 3 numbers, got {len(args.patch)}")
    if args.patch is not None and min(args.patch) < 1:
        raise LightNetsError(f"--patch takes numbers of voxels, got {' '.join(map(str, args.patch))}")
    for name in ("channels", "classes"):
        if getattr(args, name) < 1:
            raise LightNetsError(f"--{name} must be at least 1, got {getattr(args, name)}")
    patches = [args.patch] if args.patch else list(DEFAULT_PATCH.values())
    for patch in patches:
        print("\n".join(table(patch, args.channels, args.classes)), end="\n\n")
    print("M: million parameters. GMAC: 10^9 multiply-accumulates of one forward pass of one patch, the scan included.")
    return 0


def table(patch: list[int], channels: int, classes: int) -> list[str]:
    """Lines of the table for one patch size."""
    from nnunetv2_lightnets.benchmark.costs import count_macs, count_parameters
    from nnunetv2_lightnets.networks import create_network, network_entry
    from nnunetv2_lightnets.trainers import find_trainer, trainer_names

    dims = len(patch)
    size = " x ".join(map(str, patch))
    lines = [f"{dims}D, patch {size}, {channels} channel(s), {classes} classes"]
    lines.append(f"{'trainer (-tr)':<34}{'network':<18}{'dims':<8}{'M':>9}{'GMAC':>10}")
    for trainer_name in trainer_names():
        trainer = find_trainer(trainer_name)
        assert trainer is not None
        entry = network_entry(trainer.network_name)
        if dims not in entry.spatial_dims:
            continue
        network = create_network(
            entry.name,
            spatial_dims=dims,
            input_channels=channels,
            num_classes=classes,
            **trainer.network_kwargs,
        )
        parameters = count_parameters(network)
        gmacs = count_macs(network, channels, patch) / 1e9
        exists = ", ".join(f"{d}D" for d in entry.spatial_dims)
        lines.append(f"{trainer_name:<34}{entry.name:<18}{exists:<8}{parameters / 1e6:>9.3f}{gmacs:>10.2f}")
    return lines
