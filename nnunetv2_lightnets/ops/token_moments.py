"""Group norm over tokens (B, L, C), as moments of groups and as a scale and a shift of every channel.

Torch's own group norm copies tokens to channels-first and back or, given a channels-last view on a CPU, adds up so many
squares in a row that its result is off by 6e-5 at 64^3 voxels, and by 2e-3 if their mean is 10. Here tokens are read as
they lie.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nnunetv2_lightnets.ops.tensors import compute_dtype

FULL_PRECISION = (torch.float32, torch.float64)


def token_blocks(tokens: Tensor, widest: int) -> Iterator[slice]:
    """Slices of the L tokens (B, L, C) such that a block with ``widest`` channels is 4 MB of float32.

    All tensors of such a block are about 15 MB: small enough for the caches and for memory that the process keeps, and
    large enough that calling the operations costs little.
    """
    step = max(256, 2**20 // (tokens.shape[0] * widest))
    return (slice(start, start + step) for start in range(0, tokens.shape[1], step))


def is_cpu_code(tokens: Tensor) -> bool:
    """Whether torch's own kernels for CPUs run, which are few and well threaded, instead of a compiler's or a GPU's."""
    return tokens.device.type == "cpu" and tokens.dtype in FULL_PRECISION and not torch.compiler.is_compiling()


@torch.no_grad()
def moments(tokens: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation (B, G), merged from those of channels (Chan et al., 1983).

    On a CPU, those of channels are merged from those of blocks. Half precision is computed in float32.
    """
    if not is_cpu_code(tokens):
        of_channels = torch.var_mean(tokens.to(compute_dtype(tokens)), 1, correction=0)
        var, mean = (x.reshape(tokens.shape[0], groups, -1) for x in of_channels)  # (B, G, C / G)
        group_mean = mean.mean(2, keepdim=True)
        group_var = (var + (mean - group_mean).square()).mean(2)
        return group_mean.squeeze(2), torch.rsqrt(group_var + eps)
    means, variances, shares = [], [], []
    for block in token_blocks(tokens, tokens.shape[2]):
        x = tokens[:, block]
        mean = x.mean(1, keepdim=True)  # (B, 1, C)
        means.append(mean)
        variances.append((x - mean).square_().mean(1, keepdim=True))
        shares.append(x.shape[1] / tokens.shape[1])
    grouped = (tokens.shape[0], len(shares), groups, -1)  # (B, blocks, G, C / G)
    block_means, block_variances = torch.cat(means, 1).reshape(grouped), torch.cat(variances, 1).reshape(grouped)
    share = tokens.new_tensor(shares)[:, None, None]
    mean = (block_means * share).sum(1, keepdim=True).mean(3, keepdim=True)  # (B, 1, G, 1)
    var = ((block_variances + (block_means - mean).square()) * share).sum(1).mean(2)  # (B, G)
    return mean.flatten(1), torch.rsqrt(var + eps)


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
