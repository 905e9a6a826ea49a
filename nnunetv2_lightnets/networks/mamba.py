"""The Mamba block: a gated selective state space model over a sequence of tokens.

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752, section 3.4;
https://github.com/state-spaces/mamba (Apache-2.0). Parameters have the names of that repository's ``Mamba`` module, so
that checkpoints need no renaming.

The block is one operator, which keeps nothing but its input for the backward pass (``ops/mamba_layer``). Tokens stay
channels-last, (B, L, C), from the first projection to the last: a projection is then one matrix product over contiguous
rows, and the convolution and the scan read the parts of its output as views.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_lightnets.ops import Layer, causal_conv1d, mamba_layer, selective_scan


class Mamba(nn.Module):
    """Mamba block with a selective scan in one direction, from the first token to the last.

    Args:
        d_model: channels C of the tokens.
        d_state: size N of the state of each inner channel.
        d_conv: kernel size of the causal convolution over the tokens.
        expand: inner channels D per channel of the tokens.
        scan: False leaves the scan out, for ablations: of its output only the term ``D * u`` stays, gated as before, so
            that a token sees no further than the convolution's kernel. There are no parameters for what is left out.

    Under autocast the projections before the scan use the low precision; the scan and the output projection run in
    float32, because the scan's output reaches values (about 1e6) that float16 does not hold.
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, scan: bool = True) -> None:
        super().__init__()
        self.has_scan = scan
        self.d_state = d_state
        self.d_conv = d_conv
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
        if scan:
            self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
            self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
            self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        if scan:
            self._init_dt()

    @torch.no_grad()
    def _init_dt(self) -> None:
        """Draw the step sizes as the paper does (section 3.6): log-uniform in [1e-3, 0.1] after the softplus."""
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        dt = torch.empty(self.d_inner).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, L, C) to (B, L, C); a token sees itself and those before it."""
        return mamba_layer(self.layer(tokens)) if self.has_scan else self.plain(tokens)

    def layer(self, tokens: Tensor, **around: Any) -> Layer:
        """The call of the operator for this block, and for what is around it: further fields of :class:`Layer`."""
        return Layer(
            tokens=tokens,
            in_weight=self.in_proj.weight,
            conv_weight=self.conv1d.weight.squeeze(1),
            conv_bias=cast(Tensor, self.conv1d.bias),
            x_weight=self.x_proj.weight,
            dt_weight=self.dt_proj.weight,
            dt_bias=self.dt_proj.bias,
            A_log=self.A_log,
            D=self.D,
            out_weight=self.out_proj.weight,
            low=autocast_dtype(tokens),
            **around,
        )

    def plain(self, tokens: Tensor) -> Tensor:
        """The same step by step for all tokens at once: for ablations, and what the operator is tested against."""
        if not self.has_scan:
            u, z = (at_least_float32(x) for x in self.convolved(tokens))
            return self.project_out(at_least_float32(self.D) * u * F.silu(z))
        return self.project_out(self.scan(*self.scan_inputs(tokens)))

    def convolved(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The scan's input u and the gate z, both (B, L, D), for tokens (B, L, C)."""
        x, z = self.in_proj(tokens).split(self.d_inner, dim=-1)
        u = causal_conv1d(x.transpose(1, 2), self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
        return u.transpose(1, 2), z

    def scan_inputs(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the scan reads for tokens (B, L, C): u, delta (B, L, D), B, C (B, L, N) and the gate z (B, L, D)."""
        u, z = self.convolved(tokens)
        dt, b, c = self.x_proj(u).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        return u, F.linear(dt, self.dt_proj.weight), b, c, z  # the bias of dt_proj is added inside the scan

    def scan(self, u: Tensor, delta: Tensor, b: Tensor, c: Tensor, z: Tensor) -> Tensor:
        """Gated output (B, L, D) of the selective scan, at least in float32."""
        u, delta, b, c, z = (at_least_float32(x).transpose(1, 2) for x in (u, delta, b, c, z))
        D, bias = at_least_float32(self.D), at_least_float32(self.dt_proj.bias)
        return selective_scan(u, delta, self.A, b, c, D, z, bias, delta_softplus=True).transpose(1, 2)

    @property
    def A(self) -> Tensor:
        """State matrix (D, N): its diagonals, negative, at least in float32."""
        return -torch.exp(at_least_float32(self.A_log))

    def project_out(self, y: Tensor) -> Tensor:
        """Map the scan's output (B, L, D) to tokens (B, L, C), without autocast."""
        with full_precision(y):
            return F.linear(y.to(self.out_proj.weight.dtype), self.out_proj.weight)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` itself, or in float32 if it is in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on where ``x`` is."""
    device = x.device.type
    # torch 2.11's compiler cannot trace the question, and compiles for devices that have autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to products with ``x``; None where it leaves them alone."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) and x.dtype != torch.float64 else None


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Context without autocast; nothing at all where autocast is off, so that exported graphs stay plain."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()
