"""Backend "native": a whole Mamba layer on CPUs, in C (``ops/csrc/mamba_kernel.c``)."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from nnunetv2_lightnets.ops import native_library as lib
from nnunetv2_lightnets.ops.mamba_layer.record import TENSORS, Gradients, Layer
from nnunetv2_lightnets.ops.selective_scan.record import CHUNK
from nnunetv2_lightnets.ops.tensors import in_layout_of, on_cpu

NAME = "native"


def takes(layer: Layer) -> bool:
    """Whether the kernel is there and computes this layer. Asked about tensors without memory, too."""
    dtype = layer.tokens.dtype
    return (
        on_cpu(layer.tokens)
        and layer.low is None
        and dtype in (torch.float32, torch.float64)
        and all(x is None or (x.dtype == dtype and x.layout == torch.strided) for x in layer.tensors())
        and lib.unavailable() is None
    )


def run_length(layer: Layer) -> int:
    """Tokens that are computed at a time: their activations are to stay in the second-level cache.

    Longer runs save fewer states, shorter ones let more threads follow one another.
    """
    return CHUNK * min(8, max(1, 4096 // (CHUNK * layer.tokens.shape[2])))


def _runs(layer: Layer) -> int:
    return -(-layer.tokens.shape[1] // run_length(layer))


def saved_numbers(layer: Layer) -> int:
    """How many numbers of states :func:`forward` saves: (B, run, N, D), those before each run."""
    return layer.tokens.shape[0] * _runs(layer) * layer.A_log.numel()


def fits(layer: Layer, states: Tensor) -> bool:
    """Whether these are the states that :func:`forward` saves, for :func:`backward`."""
    return states.numel() == saved_numbers(layer)


def workspace(layer: Layer, backwards: bool) -> int:
    """Bytes that a pass allocates beside its results."""
    given = {name: 1 for name in _POINTERS if getattr(layer, name, layer.D) is not None}
    precision = lib.DTYPES[layer.tokens.dtype]
    return int(lib.library().ln_mamba_bytes(ctypes.byref(_sizes(layer, **given)), precision, backwards))


_POINTERS = tuple("A" if name == "A_log" else name for name in TENSORS)  # as C calls them


def _sizes(layer: Layer, **pointers: int | None) -> Any:
    """What C is told of a layer beside results and gradients."""
    return lib.MambaStruct(
        batch=layer.tokens.shape[0],
        length=layer.tokens.shape[1],
        channels=layer.tokens.shape[2],
        inner=layer.channels,
        states=layer.A_log.shape[1],
        rank=layer.dt_weight.shape[1],
        width=layer.conv_weight.shape[1],
        outputs=(layer.out_weight if layer.proj_weight is None else layer.proj_weight).shape[0],
        groups=layer.groups,
        run=run_length(layer),
        threads=torch.get_num_threads(),
        group_eps=layer.group_eps,
        norm_eps=layer.norm_eps,
        **pointers,
    )


def _arguments(layer: Layer) -> tuple[Any, dict[str, Tensor | None]]:
    """The layer in the form that C takes, and its tensors in the order of :data:`TENSORS`, dense, under C's names."""
    dtype = layer.tokens.dtype
    dense = {
        name: None if x is None else lib.dense(x, dtype) for name, x in zip(_POINTERS, layer.tensors(), strict=True)
    }
    # Not exp, which wakes all threads for these few numbers.
    dense["A"] = -torch.exp2(lib.dense(layer.A_log, dtype) * math.log2(math.e))
    return _sizes(layer, **{name: lib.pointer(x) for name, x in dense.items()}), dense


def forward(layer: Layer, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, L, Co), states (flat, empty without ``save``) and moments (B, groups, 2)."""
    arguments, _tensors = _arguments(layer)  # the tensors are alive as long as the pointers to them
    out, moments = layer.new_output(), layer.new_moments()
    states = layer.tokens.new_empty(saved_numbers(layer) if save else 0)
    arguments.out, arguments.moments = out.data_ptr(), moments.data_ptr()
    arguments.run_states = states.data_ptr() if save else None
    lib.check_status(lib.library().ln_mamba_forward(ctypes.byref(arguments), lib.DTYPES[out.dtype]))
    return out, states, moments


def backward(layer: Layer, grad_out: Tensor, states: Tensor, moments: Tensor) -> Gradients:
    """Gradients of :meth:`Layer.tensors`."""
    arguments, tensors = _arguments(layer)
    grad_out, states, moments = lib.dense(grad_out, layer.tokens.dtype), states.contiguous(), moments.contiguous()
    arguments.run_states, arguments.moments = states.data_ptr(), moments.data_ptr()
    arguments.grad_out = grad_out.data_ptr()
    gradients = {name: torch.empty_like(x) for name, x in tensors.items() if x is not None}
    for name, gradient in gradients.items():
        setattr(arguments, f"d{name}", gradient.data_ptr())
    lib.check_status(lib.library().ln_mamba_backward(ctypes.byref(arguments), lib.DTYPES[grad_out.dtype]))
    A = tensors["A"]
    assert A is not None
    gradients["A_log"] = gradients.pop("A").mul_(A)  # A = -exp(A_log)
    gradients["tokens"] = in_layout_of(layer.tokens, gradients["tokens"])
    return layer.gradients(gradients)
