"""LightM-UNet: a U-Net whose encoder consists of Mamba layers alone.

Source: Liao et al., "LightM-UNet: Mamba Assists in Lightweight UNet for Medical Image Segmentation", arXiv 2403.05246;
https://github.com/MrBlankness/LightM-UNet (Apache-2.0). Where text and code differ, this is the published code, which
its checkpoints fit; docs/lightm_unet.md lists the differences, and says why the paper's parameter counts are not this
network's (5.01 M in 2D, 5.02 M in 3D).

Features are tokens, (B, L, C) with L voxels in row-major order, from the stem to the logits: projections, norms and the
scan read contiguous rows. What torch wants as (B, C, *spatial) gets a channels-last view of the same memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks.depthwise import depthwise_convolution
from nnunetv2_lightnets.networks.layers import CONVOLUTION, LINEAR_INTERPOLATION, checked_strides, max_pool
from nnunetv2_lightnets.networks.mamba import Mamba, at_least_float32, full_precision, is_autocast
from nnunetv2_lightnets.networks.padding import crop_to, pad_to_multiple, total_stride
from nnunetv2_lightnets.networks.recompute import recomputed
from nnunetv2_lightnets.networks.registry import register_network
from nnunetv2_lightnets.ops import mamba_layer
from nnunetv2_lightnets.ops.tensors import on_cpu
from nnunetv2_lightnets.ops.token_moments import (
    FULL_PRECISION,
    input_gradient,
    is_cpu_code,
    moments,
    per_channel,
    scale_and_shift,
    token_blocks,
)

NORM_GROUPS = 8


def to_tokens(x: Tensor) -> Tensor:
    """Tokens (B, L, C) of ``x`` (B, C, *spatial), voxels in row-major order; a view if ``x`` is channels-last."""
    return x.movedim(1, -1).flatten(1, -2)


def to_grid(tokens: Tensor, spatial: Sequence[int]) -> Tensor:
    """Channels-last view (B, C, *spatial) of tokens (B, L, C)."""
    return tokens.reshape(tokens.shape[0], *spatial, tokens.shape[2]).movedim(-1, 1)


def computes_in_blocks(tokens: Tensor) -> bool:
    """Whether norms run block by block: for prediction on a CPU, where moving tokens costs more than computing.

    Tensors that stand for others, as in compilers and counters of operations, see the norm as a whole.
    """
    return (
        type(tokens) is Tensor
        and on_cpu(tokens)
        and tokens.dtype in FULL_PRECISION
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class TokenGroupNorm(nn.Module):
    """Group norm over tokens (B, L, C), followed by ReLU, in float32 at least, which is its result under autocast.

    Tokens are read as they lie (see ``ops/token_moments.py``). Compiled code reads them twice and writes once forwards;
    it reads tokens and gradient twice and writes once backwards, but for ReLU's mask. Without a compiler there are more
    passes: see :class:`_GroupNorm`.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, tokens: Tensor, overwrite: bool = False) -> Tensor:
        """Normalised and rectified tokens (B, L, C), which may take the place of ``tokens`` if told so."""
        if computes_in_blocks(tokens):
            activate = self.with_moments_of(tokens)
            out = tokens if overwrite else torch.empty_like(tokens)
            for block in token_blocks(tokens, tokens.shape[2]):
                activate(tokens[:, block], out=out[:, block])
            return out
        return F.relu_(_GroupNorm.apply(tokens, self.weight, self.bias, *self.moments(tokens)))

    def with_moments_of(self, tokens: Tensor) -> Callable[..., Tensor]:
        """The same function for parts of ``tokens`` (B, L', C), without gradients."""
        scale, shift = scale_and_shift(*self.moments(tokens), self.weight, self.bias)
        return lambda block, out=None: torch.addcmul(shift, block, scale, out=out).relu_()

    def moments(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal standard deviation (B, G)."""
        return moments(tokens, NORM_GROUPS, self.eps)


class _GroupNorm(torch.autograd.Function):
    """Group norm of tokens (B, L, C) with given moments, which take part in the gradient.

    Without a compiler, passes over memory are one read and one write forwards; backwards, eight reads and four writes,
    but on CPUs, where blocks stay in the caches, four and one. Moments and ReLU come on top.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight, mean, rstd)
        to_float32 = is_autocast(tokens)
        with full_precision(tokens):  # autocast would copy tokens to float32 first
            scale, shift = scale_and_shift(mean, rstd, weight, bias)
            normalised = torch.addcmul(shift, tokens, scale)
        return normalised if to_float32 else normalised.to(tokens.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, mean, rstd = ctx.saved_tensors
        with full_precision(tokens):
            return *_group_norm_gradients(grad, tokens, weight, mean, rstd), None, None


def _group_norm_gradients(
    grad: Tensor, tokens: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens (B, L, C), weight and bias (C,)."""
    grad, channels = at_least_float32(grad), weight.shape[0]
    scale, shift = per_channel(rstd, channels), per_channel(-mean * rstd, channels)
    # On a CPU block by block, in the caches; torch's kernel copies all to another layout and back.
    blocks = list(token_blocks(tokens, channels)) if is_cpu_code(tokens) else [slice(None)]
    of_blocks = [
        (part.sum(1), torch.addcmul(shift, tokens[:, block], scale).mul_(part).sum(1))
        for block, part in ((block, grad[:, block]) for block in blocks)
    ]
    of_grad, of_both = (torch.stack(sums).sum(0) for sums in zip(*of_blocks, strict=True))  # (B, C)
    slope, offset = input_gradient((of_grad, of_both), mean, rstd, weight, tokens.shape[1])
    factor = scale * weight

    def of_tokens(block: slice) -> Tensor:
        return torch.addcmul(offset, tokens[:, block], slope).addcmul_(grad[:, block], factor).to(tokens.dtype)

    if len(blocks) == 1:
        dtokens = of_tokens(blocks[0])
    else:
        dtokens = torch.empty_like(tokens)
        for block in blocks:
            dtokens[:, block] = of_tokens(block)
    return dtokens, of_both.sum(0).to(weight.dtype), of_grad.sum(0).to(weight.dtype)


class MambaLayer(nn.Module):
    """The paper's residual vision Mamba layer: ``proj(norm(mamba(norm(x)) + s * x))``, with one norm used twice."""

    def __init__(self, in_channels: int, out_channels: int, scan: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        self.mamba = Mamba(in_channels, scan=scan)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.proj = nn.Linear(in_channels, out_channels)

    def forward(self, tokens: Tensor, activation: TokenGroupNorm | None = None) -> Tensor:
        """Map tokens (B, L, C_in) to (B, L, C_out); an ``activation`` is applied to them first."""
        if not self.mamba.has_scan:
            return recomputed(self.plain, tokens, activation)
        around: dict[str, Any] = {
            "norm_weight": self.norm.weight,
            "norm_bias": self.norm.bias,
            "norm_eps": self.norm.eps,
            "skip_scale": self.skip_scale,
            "proj_weight": self.proj.weight,
            "proj_bias": self.proj.bias,
        }
        if activation is not None:
            around |= {
                "group_weight": activation.weight,
                "group_bias": activation.bias,
                "group_eps": activation.eps,
                "groups": NORM_GROUPS,
            }
        return mamba_layer(self.mamba.layer(tokens, **around))

    def plain(self, tokens: Tensor, activation: TokenGroupNorm | None = None) -> Tensor:
        """The same step by step for all tokens at once: for ablations, and what the operator is tested against."""
        x = tokens if activation is None else activation(tokens)
        out: Tensor = self.proj(self.norm(self.mamba.plain(self.norm(x)).addcmul_(x, self.skip_scale)))
        return out


class ResidualMambaBlock(nn.Module):
    """Two Mamba layers with pre-activation, added to their input."""

    def __init__(self, channels: int, scan: bool = True) -> None:
        super().__init__()
        self.norm1 = TokenGroupNorm(channels)
        self.layer1 = MambaLayer(channels, channels, scan)
        self.norm2 = TokenGroupNorm(channels)
        self.layer2 = MambaLayer(channels, channels, scan)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, L, C) to (B, L, C)."""
        out: Tensor = self.layer2(self.layer1(tokens, self.norm1), self.norm2)
        return out.add_(tokens)


class ResidualConvBlock(nn.Module):
    """Pre-activated depthwise-separable 3x3(x3) convolution with a scaled residual, then norm and ReLU."""

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        self.norm1 = TokenGroupNorm(channels)
        self.depthwise = CONVOLUTION[spatial_dims](channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Linear(channels, channels, bias=False)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.norm2 = TokenGroupNorm(channels)

    def forward(self, tokens: Tensor, spatial: Sequence[int]) -> Tensor:
        """Map tokens (B, L, C) of a grid of size ``spatial`` to (B, L, C)."""
        return recomputed(self._forward, tokens, spatial)

    def _forward(self, tokens: Tensor, spatial: Sequence[int]) -> Tensor:
        x = to_tokens(depthwise_convolution(to_grid(self.norm1(tokens), spatial), self.depthwise))
        out: Tensor = self.norm2(self.pointwise(x).addcmul_(tokens, self.skip_scale), overwrite=True)
        return out


class Stem(nn.Module):
    """Depthwise 3x3(x3), then 1x1 convolution to the width: from an image (B, C, *spatial) to tokens."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        convolution = CONVOLUTION[spatial_dims]
        self.depthwise = convolution(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.pointwise = nn.Linear(in_channels, out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image (B, C_in, *spatial) to tokens (B, L, C_out)."""
        tokens: Tensor = self.pointwise(to_tokens(self.depthwise(x)))
        return tokens


class Encoder(nn.Module):
    """Stages of residual Mamba blocks; between two stages a Mamba layer doubles the width, then max pooling."""

    def __init__(self, width: int, blocks: Sequence[int], strides: Sequence[Sequence[int]], scan: bool = True) -> None:
        super().__init__()
        self.strides = tuple(tuple(stride) for stride in strides)
        channels = [width * 2**stage for stage in range(len(blocks))]
        self.transitions = nn.ModuleList(MambaLayer(c, 2 * c, scan) for c in channels[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualMambaBlock(c, scan) for _ in range(n)))
            for c, n in zip(channels, blocks, strict=True)
        )

    def forward(self, tokens: Tensor, spatial: Sequence[int]) -> list[tuple[Tensor, tuple[int, ...]]]:
        """Tokens of every stage with the size of their grid, from fine to coarse."""
        features = []
        for stage, blocks in enumerate(self.stages):
            if stage:
                grid = to_grid(self.transitions[stage - 1](tokens), spatial)
                grid = max_pool(grid, self.strides[stage - 1])
                tokens, spatial = to_tokens(grid), grid.shape[2:]
            tokens = blocks(tokens)
            features.append((tokens, tuple(spatial)))
        return features


class DecoderStage(nn.Module):
    """1x1 convolution to half the channels, linear upsampling, addition of the skip, residual convolutions."""

    def __init__(self, spatial_dims: int, channels: int, blocks: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(2 * channels, channels, bias=False)
        self.mode = LINEAR_INTERPOLATION[spatial_dims]
        self.blocks = nn.ModuleList(ResidualConvBlock(spatial_dims, channels) for _ in range(blocks))

    def forward(self, coarse: Tensor, coarse_spatial: Sequence[int], skip: Tensor, spatial: Sequence[int]) -> Tensor:
        """Tokens (B, L, C) of the grid ``spatial`` from the coarser grid's (B, L', 2C) and the skip (B, L, C)."""
        tokens = recomputed(self._joined, coarse, coarse_spatial, skip, spatial)
        for block in self.blocks[1:]:
            tokens = block(tokens, spatial)
        return tokens

    def _joined(self, coarse: Tensor, coarse_spatial: Sequence[int], skip: Tensor, spatial: Sequence[int]) -> Tensor:
        """Both joined, and the first block, which with them keeps no more than it would alone."""
        grid = to_grid(self.reduce(coarse), coarse_spatial)
        grid = F.interpolate(grid, size=list(spatial), mode=self.mode, align_corners=False)
        tokens = to_tokens(grid).add_(skip)
        for block in self.blocks[:1]:
            tokens = block(tokens, spatial)
        return tokens


class Decoder(nn.Module):
    """Stages from coarse to fine, then norm, ReLU, a scale and an offset per channel, and the logits.

    There is one output whatever ``deep_supervision`` is set to.
    """

    def __init__(self, spatial_dims: int, width: int, blocks: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.deep_supervision = False
        self.stages = nn.ModuleList(
            DecoderStage(spatial_dims, width * 2**stage, n)
            for stage, n in zip(reversed(range(len(blocks))), blocks, strict=True)
        )
        self.norm = TokenGroupNorm(width)
        self.scale = nn.Parameter(torch.empty(width).uniform_(-1, 1))  # as a 1x1 depthwise convolution starts
        self.offset = nn.Parameter(torch.empty(width).uniform_(-1, 1))
        self.seg_layers = nn.ModuleList([nn.Linear(width, num_classes)])

    def forward(self, features: Sequence[tuple[Tensor, tuple[int, ...]]]) -> Tensor:
        """Logits (B, classes, *spatial) from the encoder's features."""
        tokens, spatial = features[-1]
        for stage, (skip, skip_spatial) in zip(self.stages, reversed(features[:-1]), strict=True):
            tokens, spatial = stage(tokens, spatial, skip, skip_spatial), skip_spatial
        logits = recomputed(self._head, tokens)
        return logits.reshape(*logits.shape[:2], *spatial)

    def _head(self, tokens: Tensor) -> Tensor:
        head = cast(nn.Linear, self.seg_layers[0])
        # Scale and offset go into the head's few numbers instead of over all voxels.
        weight, bias = head.weight * self.scale, torch.addmv(head.bias, head.weight, self.offset)
        normalised = self.norm(tokens, overwrite=True).transpose(1, 2)  # (B, width, L)
        return torch.matmul(weight, normalised) + bias.unsqueeze(-1)  # (B, classes, L)


@register_network("lightm_unet", spatial_dims=(2, 3))
class LightMUNet(nn.Module):
    """LightM-UNet for images and volumes of any size.

    Inputs are padded with zeros at the end of each axis to a multiple of the total stride, and the logits cropped back.

    Args:
        spatial_dims: 2 or 3.
        input_channels: channels of the image.
        num_classes: channels of the logits.
        deep_supervision: the network was published with one output, so only False is taken.
        width: channels of the first stage, a multiple of 8; 32 is the published network (5.02 M parameters in 3D),
            16 has 1.34 M and 8 has 0.38 M.
        blocks_down: residual Mamba blocks of each encoder stage.
        blocks_up: residual convolution blocks of each decoder stage, from coarse to fine.
        strides: stride per downsampling and axis, e.g. ((1, 2, 2), (2, 2, 2), (2, 2, 2)); 2 everywhere if None.
        scan: False builds the network without its selective scans, an ablation, see :class:`Mamba`.

    Raises:
        LightNetsError: for deep supervision, a width that is no multiple of 8, or stages that do not fit together.
    """

    def __init__(
        self,
        spatial_dims: int,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        width: int = 32,
        blocks_down: Sequence[int] = (1, 2, 2, 4),
        blocks_up: Sequence[int] = (1, 1, 1),
        strides: Sequence[Sequence[int]] | None = None,
        scan: bool = True,
    ) -> None:
        super().__init__()
        if width < NORM_GROUPS or width % NORM_GROUPS:
            raise LightNetsError(
                f"lightm_unet's width must be a multiple of {NORM_GROUPS} (its norms have {NORM_GROUPS} groups), "
                f"got {width}; published is 32, smaller are 16 and 8"
            )
        if not 0 < len(blocks_up) == len(blocks_down) - 1:
            raise LightNetsError(
                f"lightm_unet takes one entry less in blocks_up than in blocks_down, and at least one, got "
                f"{list(blocks_up)} and {list(blocks_down)}"
            )
        strides = checked_strides("lightm_unet", strides, len(blocks_up), spatial_dims)
        self.multiple = total_stride(strides)
        self.stem = Stem(spatial_dims, input_channels, width)
        self.encoder = Encoder(width, blocks_down, strides, scan)
        self.decoder = Decoder(spatial_dims, width, blocks_up, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes, *spatial) of an image (B, channels, *spatial)."""
        padded = pad_to_multiple(x, self.multiple)
        logits: Tensor = self.decoder(self.encoder(self.stem(padded), padded.shape[2:]))
        return crop_to(logits, x.shape[2:])

    def from_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict under our names; 1x1 convolutions are linear layers here and lose those axes."""
        state = {_our_name(key): tensor for key, tensor in state_dict.items()}
        for key, tensor in state.items():
            if key.endswith((".pointwise.weight", ".reduce.weight", ".seg_layers.0.weight")):
                state[key] = tensor.flatten(1)  # (C_out, C_in)
            elif key == "decoder.scale":
                state[key] = tensor.flatten()
        return state


_OFFICIAL_NAMES = (
    (r"^convInit\.0\.conv\.", "stem.depthwise."),
    (r"^convInit\.1\.conv\.", "stem.pointwise."),
    (r"^up_samples\.(\d+)\.0\.conv\.", r"decoder.stages.\1.reduce."),
    (r"^up_layers\.(\d+\.)(\d+\.)", r"decoder.stages.\1blocks.\2"),
    (r"\.conv\.0\.conv\.", ".depthwise."),
    (r"\.conv\.1\.conv\.", ".pointwise."),
    (r"^conv_final\.0\.", "decoder.norm."),
    (r"^conv_final\.2\.0\.conv\.weight$", "decoder.scale"),
    (r"^conv_final\.2\.0\.conv\.bias$", "decoder.offset"),
    (r"^conv_final\.2\.1\.conv\.", "decoder.seg_layers.0."),
)


def _our_name(official: str) -> str:
    """Our name of a parameter of the published code."""
    if match := re.match(r"down_layers\.(\d+)\.(\d+)\.", official):
        stage, entry, inner = int(match[1]), int(match[2]), official[match.end() :]
        if entry == 0:  # the Mamba layer before the pooling; it is itself entry 0 of a sequence
            return f"encoder.transitions.{stage - 1}.{inner.removeprefix('0.')}"
        inner = re.sub(r"^conv([12])\.", r"layer\1.", inner)  # Mamba layers, whatever they are called
        return f"encoder.stages.{stage}.{entry - 1}.{inner}"
    for pattern, name in _OFFICIAL_NAMES:
        official = re.sub(pattern, name, official)
    return official
