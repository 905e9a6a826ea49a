"""Visual state space blocks (VMamba) and the encoder that Swin-UMamba and Swin-UMamba† share.

Papers: VMamba: Visual State Space Model, Liu et al., arXiv 2401.10166 (the code's first version, January 2024, which
the published ImageNet weights belong to; repository MzeroMiko/VMamba, MIT); Swin-UMamba, Liu et al., arXiv 2402.03302
(repository JiarunLiu/Swin-UMamba, Apache-2.0).

Feature maps are channels-last, (B, H, W, C), throughout: norms and projections act on single pixels, and the scan
reads whole pixels. Parameters carry VMamba's own names and shapes, so that its checkpoints need no translation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks.recompute import recomputed
from nnunetv2_lightnets.ops import CROSS_SCAN, directional_scan, scan_order

DIRECTIONS = len(CROSS_SCAN)  # along rows, along columns, and both backwards


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): in training, drops a whole residual branch per sample.

    What is kept is scaled by ``1 / (1 - probability)``.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples of ``x`` (B, ...)."""
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        """Shown by ``print(network)``."""
        return f"probability={self.probability:.3g}"


class SS2D(nn.Module):
    """2D selective scan (VMamba, section 4.2): four directional scans over all pixels, summed, gated.

    Args:
        dim: channels C of the input and output.
        d_state: size N of each channel's hidden state.
        expand: inner channels are ``expand * dim``.
        scan: False leaves the scans out, for ablations: of their sum only the term ``D * u`` stays, with one D for all
            directions, so that a pixel sees its 3x3 neighbours alone. There are no parameters for what is left out.
    """

    def __init__(self, dim: int, d_state: int = 16, expand: int = 2, scan: bool = True) -> None:
        super().__init__()
        self.has_scan = scan
        inner = expand * dim
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        if scan:
            self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, self.dt_rank + 2 * d_state, inner))
            self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, inner, self.dt_rank))
            self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, inner))
            self.A_logs = nn.Parameter(torch.empty(DIRECTIONS * inner, d_state))
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * inner if scan else inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        if scan:
            self._init_scan()

    @torch.no_grad()
    def _init_scan(self) -> None:
        """Mamba's own initial values: A = -1..-N, step sizes log-uniform in 1e-3 to 1e-1."""
        for weight in (self.x_proj_weight, self.dt_projs_weight):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        step = torch.exp(torch.empty_like(self.dt_projs_bias).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_projs_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.A_logs.copy_(torch.log(torch.arange(1.0, self.d_state + 1)).expand_as(self.A_logs))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, H, W, C) to the same shape."""
        batch, height, width, _ = x.shape
        inner, tokens = self.out_norm.normalized_shape[0], height * width
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = F.silu(self.conv2d(u.permute(0, 3, 1, 2)))
        u = u.permute(0, 2, 3, 1).reshape(batch, tokens, inner)
        if u.dtype == torch.float16:
            u = u.float()  # the sum over directions may leave float16's range; published, the scan is in float32, too
        y = self._scanned(u, (height, width)) if self.has_scan else self.Ds * u  # (B, L, inner)
        y = self.out_norm(y).reshape(batch, height, width, inner)
        out: Tensor = self.out_proj(y * F.silu(z))
        return out

    def _scanned(self, u: Tensor, size: tuple[int, int]) -> Tensor:
        """Sum of the scans in all directions over pixels ``u`` (B, L, inner) of an image of this size, same shape."""
        batch, tokens, inner = u.shape
        # The projections act on single pixels, so one matmul in image order serves all directions.
        projected = F.linear(u, self.x_proj_weight.flatten(0, 1)).view(batch, tokens, DIRECTIONS, -1)
        projected = projected.permute(0, 2, 1, 3)  # (B, K, L, R + 2N)
        dt, B, C = projected.split_with_sizes([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = torch.matmul(dt, self.dt_projs_weight.transpose(1, 2))  # (B, K, L, inner)
        y: Tensor = directional_scan(
            u.transpose(1, 2),
            delta.transpose(2, 3),
            -torch.exp(self.A_logs).view(DIRECTIONS, inner, self.d_state),
            B.transpose(2, 3),
            C.transpose(2, 3),
            self.Ds.view(DIRECTIONS, inner),
            self.dt_projs_bias,
            delta_softplus=True,
            order=scan_order(size, device=u.device),
        )
        return y.transpose(1, 2)


class VSSBlock(nn.Module):
    """Residual block of VMamba's first version: ``x + DropPath(SS2D(LayerNorm(x)))``, without an MLP."""

    def __init__(self, dim: int, d_state: int = 16, drop_path: float = 0.0, scan: bool = True) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.self_attention = SS2D(dim, d_state, scan=scan)  # VMamba's name for it
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, H, W, C) to the same shape."""
        out: Tensor = x + self.drop_path(recomputed(self._branch, x))
        return out

    def _branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.self_attention(self.ln_1(x))
        return out


class VSSStage(nn.Module):
    """Blocks of one resolution, one for each value of ``drop_paths``."""

    def __init__(self, dim: int, drop_paths: Sequence[float], d_state: int = 16, scan: bool = True) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(VSSBlock(dim, d_state, drop_path, scan) for drop_path in drop_paths))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, H, W, C) to the same shape."""
        out: Tensor = self.blocks(x)
        return out


class PatchEmbed(nn.Module):
    """Embeds each patch of ``patch_size`` x ``patch_size`` pixels in one vector."""

    def __init__(self, input_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(input_channels, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, input_channels, H, W) to (B, H / patch_size, W / patch_size, dim)."""
        out: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return out


class PatchMerging(nn.Module):
    """Halves the resolution and doubles the channels (Swin Transformer, section 3.1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, H, W, C) to (B, H // 2, W // 2, 2 C); an odd last row or column is left out, as published."""
        return recomputed(self._merged, x)

    def _merged(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        height, width = height // 2, width // 2
        x = x[:, : 2 * height, : 2 * width].reshape(batch, height, 2, width, 2, channels)
        x = x.permute(0, 1, 3, 4, 2, 5)  # (B, H/2, W/2, column, row, C): a patch's pixels in Swin's order
        out: Tensor = self.reduction(self.norm(x.reshape(batch, height, width, 4 * channels)))
        return out


class VSSMEncoder(nn.Module):
    """VMamba's backbone without its classifier: patch embedding, then stages with patch merging between them.

    Linear weights start as published: truncated normal, standard deviation 0.02.

    Args:
        input_channels: channels of the input.
        patch_size: side of the patches that are embedded, in pixels.
        dims: channels of the stages, each twice the one before.
        depths: blocks of the stages.
        d_state: size of each channel's hidden state.
        drop_path_rate: stochastic depth grows linearly over all blocks, from 0 to this value.
        scan: False leaves the scans out, see :class:`SS2D`.
    """

    def __init__(
        self,
        input_channels: int,
        patch_size: int,
        dims: Sequence[int],
        depths: Sequence[int],
        d_state: int = 16,
        drop_path_rate: float = 0.2,
        scan: bool = True,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(input_channels, dims[0], patch_size)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList(
            VSSStage(dim, [next(rates) for _ in range(depth)], d_state, scan)
            for dim, depth in zip(dims, depths, strict=True)
        )
        self.downsamples = nn.ModuleList(PatchMerging(dim) for dim in dims[:-1])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Tensor, stages: int | None = None) -> list[Tensor]:
        """Features of all stages, or of the first ``stages``: (B, H / patch_size / 2**i, W / ..., dims[i])."""
        x = self.patch_embed(x)
        features = [self.layers[0](x)]
        for downsample, stage in zip(self.downsamples, self.layers[1:stages], strict=False):
            features.append(stage(downsample(features[-1])))
        return features

    def vmamba_keys(self) -> dict[str, str]:
        """From each key of VMamba's first published checkpoints to the key of this module that it belongs to.

        VMamba keeps the merging after a stage inside it: ``layers.0.downsample`` for ``downsamples.0``.
        """
        names = (name for name, _ in self.named_parameters())
        return {re.sub(r"^downsamples\.(\d+)\.", r"layers.\1.downsample.", name): name for name in names}

    def pretrained_names(self) -> Iterator[str]:
        """Names of the parameters that are frozen at first: all but the patch embedding's."""
        return (name for name, _ in self.named_parameters() if not name.startswith("patch_embed."))


def check_pyramid(network: str, dims: Sequence[int], depths: Sequence[int]) -> None:
    """Refuse channels and depths of stages that the encoder cannot be built for.

    Raises:
        LightNetsError: not one depth per resolution, or channels that do not double.
    """
    if len(dims) != len(depths) or min(depths) < 1:
        raise LightNetsError(
            f"{network} needs one depth of at least 1 for each resolution of its VSS stages; "
            f"got channels {tuple(dims)} and depths {tuple(depths)}"
        )
    if any(coarse != 2 * fine for fine, coarse in pairwise(dims)):
        raise LightNetsError(f"{network}: the channels of the VSS stages must double each time, got {tuple(dims)}")
