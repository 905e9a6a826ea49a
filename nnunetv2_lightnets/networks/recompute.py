"""Training with less memory: what a step can compute again is not kept for the backward pass.

The steps that cost most (convolutions, scans) are not repeated: a function that ends in a convolution or a linear layer
is computed again up to that layer's input, since its backward pass needs no more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from nnunetv2_lightnets.ops.selective_scan import operator as operator  # the scan, in torch.ops

Function = Callable[..., Tensor]

_SETTINGS: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
_KEEP_SCANS: dict[str, Any] = {
    "context_fn": partial(create_selective_checkpoint_contexts, [torch.ops.nnunetv2_lightnets.selective_scan.default])
}
if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters:  # torch 2.14 asks for a choice
    _KEEP_SCANS["respect_saved_tensors_hooks"] = True


def recomputed(function: Function, *tensors: Tensor) -> Tensor:
    """``function(*tensors)``, of which only ``tensors`` are kept for the backward pass; the rest is computed again.

    The function must draw no random numbers, and change nothing but what it made.
    """
    return _checkpoint(function, *tensors)


def recomputed_but_scans(function: Function, *tensors: Tensor) -> Tensor:
    """The same, but the results of selective scans are kept, too: they are small beside what they are made of."""
    return _checkpoint(function, *tensors, **_KEEP_SCANS)


def _checkpoint(function: Function, *tensors: Tensor, **settings: Any) -> Tensor:
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return function(*tensors)
    return cast(Tensor, checkpoint(function, *tensors, **_SETTINGS, **settings))
