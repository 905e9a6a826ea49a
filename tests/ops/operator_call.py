"""How tests call the operators beneath the public functions."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from nnunetv2_lightnets.ops.selective_scan.record import Scan


def operator_arguments(scan: Scan) -> list[Any]:
    """What both operators take of a scan."""
    return [getattr(scan, field.name) for field in fields(scan)]
