"""A call of a Mamba layer: the record that the operator and its backends pass on."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.ops.tensors import compute_dtype

Gradients = tuple[Tensor | None, ...]
"""Gradients of :meth:`Layer.tensors`, in their order; None where there is no such tensor."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Arguments of a Mamba layer, as :func:`nnunetv2_lightnets.ops.mamba_layer` explains them.

    C channels, D inner channels, N states, R the rank of the step sizes, K the kernel size, Co channels of the output.
    """

    tokens: Tensor  # (B, L, C), any strides
    group_weight: Tensor | None = None  # (C,), of the group norm before ReLU; None: neither of them
    group_bias: Tensor | None = None  # (C,)
    norm_weight: Tensor | None = (
        None  # (C,), of the layer norm, used twice where proj_weight is given; None: no such norm
    )
    norm_bias: Tensor | None = None  # (C,)
    in_weight: Tensor  # (2 D, C)
    conv_weight: Tensor  # (D, K)
    conv_bias: Tensor  # (D,)
    x_weight: Tensor  # (R + 2 N, D)
    dt_weight: Tensor  # (D, R)
    dt_bias: Tensor  # (D,)
    A_log: Tensor  # (D, N)
    D: Tensor  # (D,)
    out_weight: Tensor  # (C, D)
    skip_scale: Tensor | None = None  # (1,), given where proj_weight is
    proj_weight: Tensor | None = None  # (Co, C); None: the output is the Mamba block's
    proj_bias: Tensor | None = None  # (Co,)
    groups: int = 8  # of the group norm
    group_eps: float = 1e-5
    norm_eps: float = 1e-5
    low: torch.dtype | None = None  # autocast's dtype, None where autocast is off

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors, which all have gradients; the tokens are the first."""
        return tuple(getattr(self, name) for name in TENSORS)

    def gradients(self, found: dict[str, Tensor]) -> Gradients:
        """``found``, by the name of the tensor, for :meth:`tensors`: in the shape and dtype of each."""
        return tuple(
            None if x is None else found[name].reshape(x.shape).to(x.dtype)
            for name, x in zip(TENSORS, self.tensors(), strict=True)
        )

    @property
    def channels(self) -> int:
        """D, the inner channels."""
        return self.A_log.shape[0]

    @property
    def history(self) -> int:
        """Tokens before a token that the convolution sees."""
        return self.conv_weight.shape[1] - 1

    @property
    def product_dtype(self) -> torch.dtype:
        """Of the projections before the scan and of the last one."""
        return self.low or self.tokens.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of norms, residuals and the projection after the scan: autocast leaves them in float32 at least."""
        return self.tokens.dtype if self.low is None else compute_dtype(self.tokens)

    @property
    def scan_dtype(self) -> torch.dtype:
        """Of the scan, its states and the moments: float64 for float64, else float32."""
        return compute_dtype(self.tokens)

    def new_output(self) -> Tensor:
        """Room for the output, (B, L, Co)."""
        weight = self.out_weight if self.proj_weight is None else self.proj_weight
        dtype = self.dtype if self.proj_weight is None else self.product_dtype
        return self.tokens.new_empty(*self.tokens.shape[:2], weight.shape[0], dtype=dtype)

    def new_moments(self) -> Tensor:
        """Room for the mean and the reciprocal standard deviation of every group, (B, groups, 2)."""
        groups = 0 if self.group_weight is None else self.groups
        return self.tokens.new_empty(self.tokens.shape[0], groups, 2, dtype=self.scan_dtype)

    def check(self) -> None:
        """Make sure that all tensors fit each other in shape, dtype and device, so that no kernel reads beyond them.

        Raises:
            LightNetsError: If one does not fit.
        """
        if self.tokens.dim() != 3 or not self.tokens.numel():
            raise LightNetsError(
                f"mamba_layer: tokens are {tuple(self.tokens.shape)}; they must be (B, L, C), not empty"
            )
        width = self.tokens.shape[2]
        inner, state = self.A_log.shape if self.A_log.dim() == 2 else (0, 0)
        rank = self.dt_weight.shape[-1]
        kernel = self.conv_weight.shape[-1]
        out = width if self.proj_weight is None else self.proj_weight.shape[0]
        wanted = {
            "in_weight": (2 * inner, width),
            "conv_weight": (inner, kernel),
            "conv_bias": (inner,),
            "x_weight": (rank + 2 * state, inner),
            "dt_weight": (inner, rank),
            "dt_bias": (inner,),
            "A_log": (inner, state),
            "D": (inner,),
            "out_weight": (width, inner),
            "group_weight": (width,),
            "group_bias": (width,),
            "norm_weight": (width,),
            "norm_bias": (width,),
            "skip_scale": (1,),
            "proj_weight": (out, width),
            "proj_bias": (out,),
        }
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise LightNetsError(f"mamba_layer: {name} has shape {tuple(tensor.shape)}, expected {shape}")
            if tensor.device != self.tokens.device:
                raise LightNetsError(
                    f"mamba_layer: {name} is on {tensor.device} and tokens are on {self.tokens.device}; "
                    f"move the module or the input"
                )
            if self.low is None and name in PROJECTIONS and tensor.dtype != self.tokens.dtype:
                raise LightNetsError(
                    f"mamba_layer: {name} is {tensor.dtype} and tokens are {self.tokens.dtype}; "
                    f"convert the module or the input"
                )
        for one, other in (("group_weight", "group_bias"), ("norm_weight", "norm_bias"), ("skip_scale", "proj_weight")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise LightNetsError(f"mamba_layer: {one} and {other} must be given both, or neither")
        if self.group_weight is not None and width % self.groups:
            raise LightNetsError(f"mamba_layer: {width} channels do not fall into {self.groups} groups")


TENSORS = tuple(field.name for field in fields(Layer))[:17]
PROJECTIONS = ("in_weight", "x_weight", "dt_weight", "out_weight", "proj_weight")  # applied to every token
