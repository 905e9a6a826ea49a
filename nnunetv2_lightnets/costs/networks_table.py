"""``nnUNetv2_lightnets networks``: every trainer with its network and what that costs by count."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from nnunetv2_lightnets.costs.arguments import add_patch_arguments, check_patch
from nnunetv2_lightnets.costs.trainers import fitting_trainers, trainer_costs
from nnunetv2_lightnets.errors import LightNetsError

_BATCH = 2  # patches of the training step whose memory is counted
DEFAULT_PATCH = {2: [512, 512], 3: [128, 128, 128]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments in nnU-Net's style."""
    add_patch_arguments(parser, "default: both usual ones")
    parser.add_argument(
        "--memory",
        action="store_true",
        help=f"also count the memory of a training step of {_BATCH} patches in float32 (seconds for each network)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    check_patch(args)
    patches = [args.patch] if args.patch else list(DEFAULT_PATCH.values())
    for patch in patches:
        for line in table(patch, args.channels, args.classes, memory=args.memory):
            print(line, flush=True)
        print()
    print("M: million parameters. GMAC: 10^9 multiply-accumulates of one forward pass of one patch, the scan included.")
    if args.memory:
        print(f"GB: 10^9 bytes that a training step of {_BATCH} patches takes in float32, counted without running it.")
    return 0


def table(patch: list[int], channels: int, classes: int, *, memory: bool = False) -> Iterator[str]:
    """Lines of the table for one patch size: what each trainer builds from nnU-Net's plans, as soon as known.

    Args:
        patch: size in voxels.
        channels: of the input.
        classes: background included.
        memory: whether to count a training step's memory, too.
    """
    from nnunetv2_lightnets.networks import network_entry
    from nnunetv2_lightnets.nnunet.memory import training_memory
    from nnunetv2_lightnets.nnunet.plans import patch_setting
    from nnunetv2_lightnets.nnunet.trainer import LightNetsTrainer
    from nnunetv2_lightnets.trainers import find_trainer

    setting = patch_setting(patch, channels, classes)
    yield f"{len(patch)}D, {setting.title}"
    yield f"{'trainer (-tr)':<42}{'network':<18}{'dims':<8}{'M':>9}{'GMAC':>10}" + f"{'GB':>8}" * memory
    for trainer_name in fitting_trainers(len(patch)):
        trainer = find_trainer(trainer_name)
        assert trainer is not None
        try:
            name, parameters, macs = trainer_costs(trainer, setting)
        except LightNetsError as error:  # it needs a library that is not installed
            yield f"{trainer_name:<42}{error}"
            continue
        ours = issubclass(trainer, LightNetsTrainer)
        exists = ", ".join(f"{d}D" for d in (network_entry(name).spatial_dims if ours else (2, 3)))
        of_step = f"{training_memory(trainer, setting, _BATCH).total / 1e9:>8.2f}" if memory else ""
        yield f"{trainer_name:<42}{name:<18}{exists:<8}{parameters / 1e6:>9.3f}{macs / 1e9:>10.2f}{of_step}"
