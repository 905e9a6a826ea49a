"""Group norm over tokens (B, L, C), as moments of groups and as a scale and a shift of every channel.

Torch's own group norm copies tokens to channels-first and back or, given a channels-last view on a CPU, adds up so many
squares in a row that its result is off by 6e-5 at 64^3 voxels, and by 2e-3 if their mean is 10. Here tokens are read as
they lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from nnunetv2_lightnets.ops.tensors import compute_dtype, device_type, on_cpu

FULL_PRECISION = (torch.float32, torch.float64)


# Numbers of a block of tokens: 4 MB of float32 on a CPU, 64 MB elsewhere. All tensors of a CPU's block are about 15 MB:
# small enough for the caches and for memory that the process keeps, and large enough that calling the operations costs
# little.
NUMBERS = {"cpu": 2**20}
NUMBERS_ELSEWHERE = 2**24
FEWEST = 256  # tokens of a block, however wide it is


def block_length(device: str, widest: int, at_least: int = 0) -> int:
    """Tokens of a block whose widest tensor has so many channels."""
    return max(at_least, FEWEST, NUMBERS.get(device, NUMBERS_ELSEWHERE) // widest)


def token_blocks(tokens: Tensor, widest: int) -> Iterator[slice]:
    """Slices of the L tokens (B, L, C) such that a block of all sequences with ``widest`` channels has that size."""
    step = block_length(device_type(tokens), tokens.shape[0] * widest)
    return (slice(start, start + step) for start in range(0, tokens.shape[1], step))


def is_cpu_code(tokens: Tensor) -> bool:
    """Whether torch's own kernels for CPUs run, which are few and well threaded, instead of a compiler's or a GPU's."""
    return on_cpu(tokens) and tokens.dtype in FULL_PRECISION and not torch.compiler.is_compiling()


@torch.no_grad()
def moments(tokens: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation (B, G), merged from those of blocks' channels (Chan et al., 1983).

    Half precision is computed in float32.
    """
    compiling = torch.compiler.is_compiling()
    blocks = [slice(None)] if compiling else list(token_blocks(tokens, tokens.shape[2]))
    if is_cpu_code(tokens):
        blocks = _summed_blocks(*tokens.shape[1:])
    found = [_of_channels(tokens[:, block].to(compute_dtype(tokens))) for block in blocks]  # (B, 1, C) each
    shares = [1.0] if compiling else [len(range(tokens.shape[1])[block]) / tokens.shape[1] for block in blocks]
    grouped = (tokens.shape[0], groups, -1)
    mean = torch.stack([x.mul(share) for (_, x), share in zip(found, shares, strict=True)]).sum(0)
    mean = mean.reshape(grouped).mean(2, keepdim=True)  # (B, G, 1)
    variances = [
        (var.reshape(grouped) + (of_block.reshape(grouped) - mean).square()).mul(share)
        for (var, of_block), share in zip(found, shares, strict=True)
    ]
    return mean.squeeze(2), torch.rsqrt(torch.stack(variances).sum(0).mean(2) + eps)


# Torch adds up number by number. On a CPU every n-th token of a channel counts as a channel of its own, SLOTS channels
# in all, and a block ends after LONGEST of their numbers, so that sums keep their digits.
SLOTS, LONGEST = 2**12, 2**10


def _slots(length: int, channels: int) -> int:
    """How many channels each of ``channels`` counts as: a power of two that divides the length."""
    return math.gcd(length, 1 << max(SLOTS // channels, 1).bit_length() - 1)


def _summed_blocks(length: int, channels: int) -> list[slice]:
    """Blocks of tokens that have the most slots, but for the last few tokens."""
    most = _slots(0, channels)
    even = length - length % most
    starts = [*range(0, even, LONGEST * most), even, length]
    return [slice(start, end) for start, end in pairwise(starts) if start < end]


def _of_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean (B, 1, C) of tokens (B, L, C)."""
    if not is_cpu_code(x) or type(x) is not Tensor:
        return torch.var_mean(x, 1, correction=0, keepdim=True)
    # Faster than a difference, its square and two sums, which are written between.
    batch, length, channels = x.shape
    slots = _slots(length, channels)
    images = [image.reshape(1, -1, 1, slots * channels).movedim(-1, 1) for image in torch.split(x, 1)]
    found = [torch.batch_norm_update_stats(image, None, None, 0.0) for image in images]
    means, variances = (torch.stack(one).view(batch, slots, channels) for one in zip(*found, strict=True))
    mean = means.mean(1, keepdim=True)
    return variances.add_((means - mean).square_()).mean(1, keepdim=True), mean


def per_channel(x: Tensor, channels: int) -> Tensor:
    """(B, 1, C) from what groups have, (B, G)."""
    return x.repeat_interleave(channels // x.shape[1], 1).unsqueeze(1)


def scale_and_shift(mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Group norm as ``x * scale + shift``: both (B, 1, C) from the moments (B, G) and the parameters (C,)."""
    scale = per_channel(rstd, weight.shape[0]) * weight
    return scale, bias - per_channel(mean, weight.shape[0]) * scale


def input_gradient(
    sums: tuple[Tensor, Tensor], mean: Tensor, rstd: Tensor, weight: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """What the moments add to the gradient of tokens x, as ``x * slope + offset``: both (B, 1, C).

    With n = (x - mean) rstd and g = weight grad, that gradient is rstd (g - mean(g) - n mean(g n)), where the means are
    over the tokens and channels of a group.

    Args:
        sums: of grad and of grad n over all tokens, (B, C).
        mean: (B, G).
        rstd: (B, G).
        weight: (C,).
        length: number of tokens.
    """
    channels, grouped = weight.shape[0], (*mean.shape, -1)
    mean_g, mean_gn = ((x * weight).reshape(grouped).mean(2) / length for x in sums)  # (B, G)
    slope = -rstd.square() * mean_gn
    return per_channel(slope, channels), per_channel(-rstd * mean_g - mean * slope, channels)
