"""The command ``nnUNetv2_lightnets``: one subcommand for each task a user has."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from nnunetv2_lightnets import __version__
from nnunetv2_lightnets.errors import LightNetsError

# Subcommand -> (module with add_arguments(parser) and run(args) -> exit code, one line of help).
COMMANDS = {
    "benchmark": ("nnunetv2_lightnets.costs.command", "true costs of networks here, beside the papers' claims"),
    "compare": ("nnunetv2_lightnets.comparison.command", "compare results: intervals, tests, non-inferiority, a page"),
    "demo": ("nnunetv2_lightnets.demo", "the whole way on real MRI: plan, train, predict, evaluate, picture"),
    "doctor": ("nnunetv2_lightnets.doctor", "check this installation and say what is wrong and what to do"),
    "networks": ("nnunetv2_lightnets.costs.networks_table", "table of networks, trainers and true costs"),
    "plan": ("nnunetv2_lightnets.plans.command", "plans whose patch, batch and strides fit one of our networks"),
    "weights": ("nnunetv2_lightnets.pretrained.cli", "download and check the ImageNet weights of Swin-UMamba"),
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all subcommands; only the one called ``command`` is imported and brings its arguments."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_lightnets",
        description="Lightweight networks for nnU-Net. Training itself is nnU-Net's own command: "
        "nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerLightMUNet",
    )
    parser.add_argument("--version", action="version", version=f"nnunetv2_lightnets {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, description) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=description, description=description)
        if name == command:
            module = importlib.import_module(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake is one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = build_parser(arguments[0] if arguments else None).parse_args(arguments)
    try:
        return int(args.run(args))
    except LightNetsError as error:
        print(f"Error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("Interrupted. Nothing is lost: run the same command again to go on.", file=sys.stderr)
    except OSError as error:
        if error.filename is None:  # nothing that the user could look at
            raise
        print(f"Error: {error.filename}: {error.strerror}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
