"""Orders in which the pixels of an image are scanned.

Source: Liu et al., "VMamba: Visual State Space Model", arXiv:2401.10166, section 4.2 (cross-scan).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError

Direction = tuple[Sequence[int], bool]
"""Axes of the image from the slowest to the fastest changing, and whether the path runs backwards."""

CROSS_SCAN: tuple[Direction, ...] = (((0, 1), False), ((1, 0), False), ((0, 1), True), ((1, 0), True))
"""VMamba's four directions: along rows, along columns, and both backwards."""


def scan_order(
    shape: Sequence[int], directions: Sequence[Direction] = CROSS_SCAN, device: torch.device | str | None = None
) -> Tensor:
    """Image index of every direction's t-th token.

    Args:
        shape: Spatial shape of the image, such as (H, W) or (D, H, W).
        directions: For each direction, the image's axes from the slowest to the fastest changing along the path, and
            whether the path runs backwards. ``((0, 1), False)`` reads an image row by row, ``((1, 0), False)`` column
            by column; a volume's six directions are three axis orders, forwards and backwards.
        device: Where to put the result.

    Returns:
        (K, L) in int32, with ``L = prod(shape)``; every row is a permutation of ``range(L)``.

    Raises:
        LightNetsError: If a direction does not name every axis of ``shape`` once.
    """
    length = math.prod(shape)
    image = torch.arange(length, dtype=torch.int32, device=device).view(*shape)
    order = torch.empty(len(directions), length, dtype=torch.int32, device=device)
    for path, (axes, backwards) in zip(order, directions, strict=True):
        if sorted(axes) != list(range(len(shape))):
            raise LightNetsError(
                f"scan_order: direction {tuple(axes)} must name each of the {len(shape)} axes of {tuple(shape)} once"
            )
        tokens = image.permute(*axes).flatten()
        path.copy_(tokens.flip(0) if backwards else tokens)
    return order
