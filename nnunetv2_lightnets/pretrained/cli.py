"""The command ``nnUNetv2_lightnets weights``."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_lightnets.files import CACHE_VARIABLE
from nnunetv2_lightnets.pretrained.cache import VMAMBA_FILE, VMAMBA_URLS, read_records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``nnUNetv2_lightnets weights`` takes."""
    parser.description = (
        "Get the ImageNet weights of VMamba-Tiny that Swin-UMamba starts from: download, check, convert to "
        f"safetensors. They are kept in the user's cache folder; set {CACHE_VARIABLE} for another one."
    )
    parser.add_argument(
        "--from", dest="file", type=Path, metavar="FILE", help="take this downloaded checkpoint instead of the internet"
    )
    parser.add_argument(
        "--url",
        action="append",
        metavar="URL",
        help=f"download from this address, may be given several times (default: {' then '.join(VMAMBA_URLS)})".replace(
            "%", "%%"
        ),
    )


def run(args: argparse.Namespace) -> int:
    """Get the weights, and say where they are."""
    from nnunetv2_lightnets.pretrained.download import get_vmamba

    path = get_vmamba(file=args.file, urls=args.url or VMAMBA_URLS)
    record = read_records(path.parent)[VMAMBA_FILE]
    print("VMamba-Tiny's ImageNet weights are ready.")
    print(f"file:    {path} ({record.size:,} bytes)")
    print(f"SHA-256: {record.sha256}")
    print(f"source:  {record.source}")
    return 0
