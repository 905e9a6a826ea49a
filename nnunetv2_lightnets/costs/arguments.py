"""Arguments of both commands: a patch to count or to measure on."""

from __future__ import annotations

import argparse

from nnunetv2_lightnets.errors import LightNetsError

_SMALLEST = 8  # voxels along an axis, which every network takes


def add_patch_arguments(parser: argparse._ActionsContainer, default: str) -> None:
    """``--patch``, ``--channels`` and ``--classes``; ``default`` says what no ``--patch`` means."""
    parser.add_argument(
        "--patch", type=int, nargs="+", metavar="N", help=f"patch size in voxels, 2 or 3 numbers ({default})"
    )
    parser.add_argument("--channels", type=int, default=1, help="input channels of --patch (default 1)")
    parser.add_argument(
        "--classes", type=int, default=2, help="output classes of --patch, background included (default 2)"
    )


def check_patch(args: argparse.Namespace) -> None:
    """Refuse, by a LightNetsError, a patch of other than 2 or 3 axes or too small, no channel and no class."""
    if args.patch is not None and (len(args.patch) not in (2, 3) or min(args.patch) < _SMALLEST):
        raise LightNetsError(
            f"--patch takes 2 or 3 numbers of at least {_SMALLEST} voxels, got {' '.join(map(str, args.patch))}"
        )
    check_positive({"--channels": args.channels, "--classes": args.classes})


def check_positive(numbers: dict[str, int | None]) -> None:
    """Refuse, by a LightNetsError, a number below 1, given by the name of its argument."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise LightNetsError(f"{name} must be at least 1, got {value}")
