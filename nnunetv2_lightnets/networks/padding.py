"""Padding to what a network takes and cropping back, so that any patch runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError


def total_stride(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Product over all stages of per-axis strides, e.g. ((1, 2, 2), (2, 2, 2)) -> (2, 4, 4)."""
    return tuple(math.prod(axis) for axis in zip(*strides, strict=True))


def pad_to_multiple(x: Tensor, multiple: Sequence[int]) -> Tensor:
    """Zero-pad the end of every spatial axis of ``x`` (B, C, *spatial) to a multiple of ``multiple``.

    Zero is the mean of a z-scored image. Sizes that fit are returned as they are, so that networks stay equal to the
    published ones there.
    """
    missing = [-size % m for size, m in zip(x.shape[2:], multiple, strict=True)]
    if not any(missing):
        return x
    pad = [p for axis in reversed(missing) for p in (0, axis)]
    return F.pad(x, pad)


def pad_to_bound(x: Tensor, bound: Sequence[int], network: str) -> Tensor:
    """Zero-pad the end of every spatial axis of ``x`` (B, C, *spatial) to ``bound``, the only size ``network`` takes.

    Raises:
        LightNetsError: if ``x`` is larger along an axis.
    """
    if any(side > own for side, own in zip(x.shape[2:], bound, strict=True)):
        patch, own = (" x ".join(map(str, size)) for size in (x.shape[2:], bound))
        raise LightNetsError(
            f"{network} was built for patches of {own} voxels, which some of its weights depend on, and takes none of "
            f"{patch}; predict patch by patch, or train it with that patch size"
        )
    return pad_to_multiple(x, bound)


def crop_to(x: Tensor, spatial: Sequence[int]) -> Tensor:
    """Crop the end of every spatial axis of ``x`` (B, C, *spatial) to the sizes ``spatial``, as a fresh tensor.

    A copy, not a view: whoever gets the logits may change them in place.
    """
    if tuple(x.shape[2:]) == tuple(spatial):
        return x
    kept: tuple[slice, ...] = tuple(slice(0, size) for size in spatial)
    return x[(slice(None), slice(None), *kept)].contiguous()


def crop_heads(heads: Sequence[Tensor], size: Sequence[int], scales: Sequence[Sequence[float]]) -> list[Tensor]:
    """Crop each head of a network with deep supervision to its size for an input of ``size``.

    Args:
        heads: logits (B, classes, *spatial) from fine to coarse, each at least of the size below.
        size: of the input, per axis.
        scales: of each head's resolution, per axis; 1 is the input's.

    Returns:
        Logits of which each side is the input's side times the scale, rounded, and at least 1.
    """
    return [
        crop_to(head, [side if s == 1 else max(1, round(int(side) * s)) for side, s in zip(size, scale, strict=True)])
        for head, scale in zip(heads, scales, strict=False)
    ]
