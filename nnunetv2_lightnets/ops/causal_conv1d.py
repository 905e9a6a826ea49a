"""Depthwise causal convolution along a sequence, with SiLU, as in front of Mamba's selective scan.

One operator of torch, as the scan is (see ``selective_scan/operator.py``), which saves nothing for the backward pass
but the input. It is computed by a kernel in C on CPUs (``causal_conv1d_native.py``) and in Triton on CUDA devices
(``causal_conv1d_triton.py``), where these take the call, else by torch (``causal_conv1d_torch.py``). On CUDA devices
the package causal-conv1d, where it is installed and gives correct results, takes the operator's place if it is the
faster one; not in compiled code, for which it is no single node.

Forcing the scan backend "torch" or "reference" forces torch's operations here, "triton" the Triton kernel and
"mamba_ssm" the package, where they take the call.

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752, figure 3.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.ops import causal_conv1d_native as native
from nnunetv2_lightnets.ops import causal_conv1d_torch as by_torch
from nnunetv2_lightnets.ops import causal_conv1d_triton as by_triton
from nnunetv2_lightnets.ops import tuning
from nnunetv2_lightnets.ops.library import define, define_backward
from nnunetv2_lightnets.ops.selective_scan.dispatch import forced_backend, use_backend
from nnunetv2_lightnets.ops.tensors import compute_dtype, in_layout_of, in_one_line


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """Convolve every channel with a kernel of its own, which sees a token and those before it.

    ``out[d, t] = activation(bias[d] + sum over k of weight[d, k] x[d, t - K + 1 + k])``, with zeros before the start.
    Half precision is computed in float32.

    Args:
        x: (B, D, L), any strides.
        weight: (D, K); ``weight[:, -1]`` meets the token itself.
        bias: (D,).
        activation: None or "silu".

    Returns:
        (B, D, L) in the dtype and memory layout of ``x``.

    Raises:
        LightNetsError: For shapes, dtypes or an activation that do not fit.
    """
    if activation not in (None, "silu"):
        raise LightNetsError(f"causal_conv1d: activation is {activation!r}; it must be None or 'silu'")
    _check(x, weight, bias)
    eager = type(x) is Tensor and x.is_cuda and not torch.compiler.is_compiling()
    by_package = eager and _package_takes(x, weight) and _package_first(x, weight, bias, activation)
    return (_by_package if by_package else _by_operator)(x, weight, bias, activation)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 3 or not x.numel() or not x.is_floating_point():
        raise LightNetsError(f"causal_conv1d: x is {x.dtype} {tuple(x.shape)}; it must be real (B, D, L), not empty")
    if weight.dim() != 2 or weight.shape[0] != x.shape[1] or not weight.shape[1]:
        raise LightNetsError(f"causal_conv1d: weight has shape {tuple(weight.shape)}, expected ({x.shape[1]}, any)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise LightNetsError(f"causal_conv1d: bias has shape {tuple(bias.shape)}, expected ({x.shape[1]},)")


PACKAGE = "causal-conv1d"
PACKAGE_DEVICE = "cuda"


def _package() -> Callable[..., Tensor]:
    return cast(Callable[..., Tensor], importlib.import_module("causal_conv1d").causal_conv1d_fn)


@cache
def package_unavailable() -> str | None:
    """Why the package causal-conv1d cannot be used, None if it computes a small call and its gradient correctly."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    # A broken build may fail in any way, and must only cost this kernel.
    try:
        _package()
    except Exception as error:
        return f"it cannot be imported ({in_one_line(error)})"
    try:
        return _probe()
    except Exception as error:
        return f"it fails on a small call ({in_one_line(error)})"


@torch.inference_mode(False)
@torch.enable_grad()
def _probe() -> str | None:
    x = torch.linspace(-1, 1, 2 * 5 * 8, device=PACKAGE_DEVICE).view(2, 5, 8).transpose(1, 2)
    weight = torch.linspace(-1, 1, 8 * 4, device=PACKAGE_DEVICE).view(8, 4).requires_grad_()
    bias = torch.linspace(0, 1, 8, device=PACKAGE_DEVICE)
    out = _package()(x, weight, bias, activation="silu")
    (dweight,) = torch.autograd.grad(out, weight, torch.ones_like(out))
    with torch.no_grad():
        expected = by_torch.forward(x, weight, bias, True)
        expected_dweight = by_torch.backward(torch.ones_like(out), x, weight, bias, True)[1]
    if torch.allclose(out, expected, atol=1e-3) and torch.allclose(dweight, expected_dweight, atol=1e-3):
        return None
    return "it gives wrong results for a small call"


def _package_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the package may be used, works, and reads such a tensor: rows of tokens, or aligned rows of channels."""
    readable = x.stride(2) == 1 or (x.stride(1) == 1 and not any(n % 8 for n in (x.shape[1], x.stride(0), x.stride(2))))
    return (
        readable
        and x.dtype != torch.float64
        and 2 <= weight.shape[1] <= 4
        and forced_backend() not in ("torch", "reference")
        and package_unavailable() is None
    )


def _package_first(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Whether the package, which takes the call, is to be preferred to the operator: measured where both can."""
    forced = forced_backend()
    if forced == "mamba_ssm" or not by_triton.takes(x, weight):
        return True
    if forced == "triton":
        return False
    gradients = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, weight, bias))

    def run(name: str) -> None:
        function = _by_package if name == PACKAGE else _by_operator
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            leaves = [y.detach().requires_grad_(gradients) for y in (x, weight, bias) if y is not None]
            out = function(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None, activation)
            if gradients:
                torch.autograd.grad(out, leaves, torch.ones_like(out))

    key = (*by_triton.kind(x, weight, activation is not None), "gradients" if gradients else "no gradients")
    return tuning.choose("causal convolution", key, ("triton", PACKAGE), run, x.device) == PACKAGE


def _by_package(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    dtype = compute_dtype(x)
    return _package()(x, weight.to(dtype), None if bias is None else bias.to(dtype), activation=activation)


def _by_operator(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return cast(Tensor, torch.ops.nnunetv2_lightnets.causal_conv1d(x, weight, bias, activation is not None))


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor | None = None) -> ModuleType:
    """The module whose ``forward`` and ``backward`` compute a call."""
    forced = forced_backend()
    if forced in ("torch", "reference"):
        return by_torch
    if (not x.is_cpu or forced == "triton") and by_triton.takes(x, weight):
        return by_triton
    return native if native.takes(x, weight, bias, grad) else by_torch


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    _check(x, weight, bias)
    return in_layout_of(x, _kernel(x, weight, bias).forward(x, weight, bias, silu))


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, bias)
    if grad.shape != x.shape:
        raise LightNetsError(f"causal_conv1d, backward: grad has shape {tuple(grad.shape)}, and x has {tuple(x.shape)}")
    dx, dweight, dbias = _kernel(x, weight, bias, grad).backward(grad, x, weight, bias, silu)
    return (
        in_layout_of(x, dx),
        in_layout_of(weight, dweight),
        x.new_empty(0) if bias is None or dbias is None else in_layout_of(bias, dbias),
    )


def _conv_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, bool], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.forced = forced_backend()  # gradients may be computed in another thread, or after the block that forces it


def _conv_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    with use_backend(ctx.forced) if ctx.forced else nullcontext():
        dx, dweight, dbias = torch.ops.nnunetv2_lightnets.causal_conv1d_backward(grad, x, weight, bias, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None


def _conv_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), x.new_empty(0) if bias is None else torch.empty_like(bias)


define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor",
    _conv,
    lambda x, *_: torch.empty_like(x),
    _conv_setup,
    _conv_grad,
)
define_backward(
    "causal_conv1d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool silu) -> (Tensor, Tensor, Tensor)",
    _conv_backward,
    _conv_backward_fake,
)
