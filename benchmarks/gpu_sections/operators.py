"""The operators that are compared and timed: scans, the convolution before them, the norm of LightM-UNet's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from nnunetv2_lightnets.networks.lightm_unet import TokenGroupNorm
from nnunetv2_lightnets.ops import available_backends, causal_conv1d, directional_scan, scan_order, selective_scan

STATE, KERNEL = 16, 4
CHOSEN = "chosen"  # no backend is forced
LAYOUTS = ("rows", "columns", "slices")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A copy of ``x`` (..., rows, L) in memory.

    ``rows``: the rows of a token are neighbours, as linear layers write them. ``columns``: the tokens of a row are, as
    mamba-ssm's kernel wants them. ``slices``: as rows, but of wider tokens, as parts of a linear layer's output are.
    """
    if layout == "columns":
        return x.contiguous()
    skipped = 8 if layout == "slices" else 0
    wide = x.new_empty(*x.shape[:-2], x.shape[-1], x.shape[-2] + skipped)
    return wide[..., skipped:].mT.copy_(x)


@cache
def _order(image: tuple[int, int], shuffled: bool, device: torch.device) -> Tensor:
    order = scan_order(image, device=device)
    if not shuffled:
        return order
    generator = torch.Generator().manual_seed(1)
    paths = [torch.randperm(order.shape[1], generator=generator, dtype=torch.int32) for _ in order]
    return torch.stack(paths).to(device)


@cache
def _norm(channels: int) -> TokenGroupNorm:
    return TokenGroupNorm(channels)


class Case(Protocol):
    """One call of an operator. ``inputs`` makes its tensors, all of which have gradients."""

    @property
    def operator(self) -> str:
        """Its name in the results."""

    @property
    def names(self) -> Sequence[str]:
        """Of the tensors."""

    def inputs(self, dtype: torch.dtype, device: torch.device, source: torch.device) -> list[Tensor]:
        """Random tensors on ``device``, drawn on ``source``: the same numbers, rounded to ``dtype``."""

    def compute(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Outputs, with whatever backend is forced around it."""

    def needed_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """What a forward pass must read and write, and a backward pass: every tensor of tokens once."""

    def backends(self, device: torch.device) -> list[str]:
        """The ways to compute it, :data:`CHOSEN` first."""


@dataclass(frozen=True)
class Scan:
    """A scan with skip, bias and softplus; along the four paths of ``image``, if there is one."""

    batch: int
    channels: int
    length: int
    image: tuple[int, int] | None = None
    groups: int = 1
    gate: bool = False
    state: bool = False  # starts from a state, and returns the last one
    layout: str = "rows"
    shuffled: bool = False  # paths through the image that no formula gives

    @property
    def operator(self) -> str:
        """Its name in the results."""
        return "directional scan" if self.image else "scan"

    @property
    def names(self) -> Sequence[str]:
        """Of its tensors."""
        more = ("z",) * self.gate + ("initial_state",) * self.state
        return ("u", "delta", "A", "B", "C", "D", "delta_bias", *more)

    def __str__(self) -> str:
        """Size, and what is special."""
        special = [f"{self.groups} groups"] * (self.groups > 1) + ["gate"] * self.gate + ["initial state"] * self.state
        special += ["4 directions"] * bool(self.image) + ["shuffled"] * self.shuffled
        return ", ".join([f"({self.batch}, {self.channels}, {self.length})", *special, self.layout])

    def inputs(self, dtype: torch.dtype, device: torch.device, source: torch.device) -> list[Tensor]:
        """As :class:`Case` says; step sizes are about 0.02."""
        generator = torch.Generator(source).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=source).to(device, dtype)

        paths = (4,) if self.image else ()
        tokens = (self.batch, *paths)
        parts = () if self.image else (self.groups,)
        large = torch.float64 if dtype == torch.float64 else torch.float32
        A = -torch.arange(1.0, STATE + 1, device=device, dtype=large).repeat(*paths, self.channels, 1)
        u = laid_out(draw(self.batch, self.channels, self.length), self.layout)
        delta = laid_out(draw(*tokens, self.channels, self.length), self.layout)
        B, C = (laid_out(draw(*tokens, *parts, STATE, self.length), self.layout) for _ in range(2))
        D, bias = (draw(*paths, self.channels).to(large) for _ in range(2))
        found = [u, delta, A, B, C, D, bias - 4]
        if self.gate:
            found.append(laid_out(draw(self.batch, self.channels, self.length), self.layout))
        if self.state:
            found.append(draw(self.batch, self.channels, STATE).to(large))
        return found

    def compute(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """As :class:`Case` says."""
        given = dict(zip(self.names, tensors, strict=True))
        if self.image:
            order = _order(self.image, self.shuffled, tensors[0].device)
            return (directional_scan(**given, delta_softplus=True, order=order),)
        if self.state:
            return selective_scan(**given, delta_softplus=True, return_last_state=True)
        return (selective_scan(**given, delta_softplus=True),)

    def needed_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """As :class:`Case` says; states, and what has no tokens, are not counted."""
        paths = 4 if self.image else 1
        u = self.batch * self.channels * self.length
        vectors = self.batch * STATE * self.length * (paths if self.image else self.groups)
        inputs = u * (1 + self.gate) + paths * u + 2 * vectors
        return dtype.itemsize * (inputs + u), dtype.itemsize * (inputs + u + inputs)

    def backends(self, device: torch.device) -> list[str]:
        """As :class:`Case` says. On CUDA the loop over tokens, which takes seconds, is left out."""
        other = {"native", "reference"} if device.type == "cuda" else set()
        return [CHOSEN, *(name for name, reason in available_backends().items() if not reason and name not in other)]


@dataclass(frozen=True)
class Convolution:
    """The causal convolution with SiLU, kernel size 4, with bias."""

    batch: int
    channels: int
    length: int
    layout: str = "rows"
    operator = "causal convolution"
    names = ("x", "weight", "bias")

    def __str__(self) -> str:
        """Size and layout."""
        return f"({self.batch}, {self.channels}, {self.length}), {self.layout}"

    def inputs(self, dtype: torch.dtype, device: torch.device, source: torch.device) -> list[Tensor]:
        """As :class:`Case` says."""
        generator = torch.Generator(source).manual_seed(0)
        shapes = (self.batch, self.channels, self.length), (self.channels, KERNEL), (self.channels,)
        x, weight, bias = (torch.randn(s, generator=generator, device=source).to(device, dtype) for s in shapes)
        return [laid_out(x, self.layout), weight, bias]

    def compute(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """As :class:`Case` says."""
        return (causal_conv1d(*tensors, activation="silu"),)

    def needed_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """As :class:`Case` says."""
        x = dtype.itemsize * self.batch * self.channels * self.length
        return 2 * x, 3 * x

    def backends(self, device: torch.device) -> list[str]:
        """As :class:`Case` says; ``mamba_ssm`` forces the package causal-conv1d, ``torch`` torch's operations."""
        triton = available_backends()["triton"] is None
        package = device.type == "cuda" and find_spec("causal_conv1d") is not None
        return [CHOSEN, *["triton"] * triton, *["mamba_ssm"] * package, "torch"]


@dataclass(frozen=True)
class Norm:
    """Group norm, with ReLU, of LightM-UNet's tokens (B, L, C)."""

    batch: int
    channels: int
    length: int
    operator = "group norm"
    names = ("tokens", "weight", "bias")

    def __str__(self) -> str:
        """Size as that of the scan."""
        return f"({self.batch}, {self.channels}, {self.length}), rows"

    def inputs(self, dtype: torch.dtype, device: torch.device, source: torch.device) -> list[Tensor]:
        """As :class:`Case` says; no token comes near the rectifier's kink, where the gradient jumps."""
        generator = torch.Generator(source).manual_seed(0)
        shapes = (self.batch, self.length, self.channels), (self.channels,), (self.channels,)
        tokens, weight, bias = (torch.randn(s, generator=generator, device=source) for s in shapes)
        found = 1 + tokens + tokens.sign() / 2, 1 + weight.abs(), bias.clamp(-1, 1) / 5
        return [x.to(device, dtype) for x in found]

    def compute(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """As :class:`Case` says."""
        tokens, weight, bias = tensors
        return (functional_call(_norm(self.channels), {"weight": weight, "bias": bias}, (tokens,)),)

    def needed_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """As :class:`Case` says, although the moments must be known before the first output."""
        x = dtype.itemsize * self.batch * self.channels * self.length
        return 2 * x, 3 * x

    def backends(self, device: torch.device) -> list[str]:
        """As :class:`Case` says."""
        return [CHOSEN]
