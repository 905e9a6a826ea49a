"""Padding to a network's stride and cropping back, so that any patch runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def total_stride(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Product over all stages of per-axis strides, e.g. ((1, 2, 2), (2, 2, 2)) -> (2, 4, 4)."""
    product = [1] * len(strides[0])
    for stride in strides:
        product = [p * s for p, s in zip(product, stride, strict=True)]
    return tuple(product)


def pad_to_multiple(x: Tensor, multiple: Sequence[int]) -> Tensor:
    """Zero-pad the end of every spatial axis of ``x`` (B, C, *spatial) to a multiple of ``multiple``.

    Zero is the mean of a z-scored image, and what nnU-Net itself pads with. Sizes that fit are returned as they
    are, so that networks stay equal to the published ones there.
    """
    missing = [-size % m for size, m in zip(x.shape[2:], multiple, strict=True)]
    if not any(missing):
        return x
    pad = [p for axis in reversed(missing) for p in (0, axis)]
    return F.pad(x, pad)


def crop_to(x: Tensor, spatial: Sequence[int]) -> Tensor:
    """Crop the end of every spatial axis of ``x`` (B, C, *spatial) to the sizes ``spatial``, as a fresh tensor.

    A cropped view would alias memory that nnU-Net's predictor then changes in place, so it is copied.
    """
    if tuple(x.shape[2:]) == tuple(spatial):
        return x
    kept: tuple[slice, ...] = tuple(slice(0, size) for size in spatial)
    return x[(slice(None), slice(None), *kept)].contiguous()
