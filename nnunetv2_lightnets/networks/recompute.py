"""Training with less memory: what a step can compute again is not kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)``, of which only ``tensors`` are kept for the backward pass; the rest is computed again.

    A function that ends in a convolution or a linear layer is computed again up to that layer's input, since its
    backward pass needs no more. So the steps that cost most are not repeated where functions end in them.

    The function must draw no random numbers, and change nothing but what it made.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
