"""Freezing parameters for some epochs, by leaving their gradients out.

A frozen parameter keeps ``requires_grad``, takes part in DistributedDataParallel and stays in the optimizer; it only
has no gradient when the optimizer steps, and optimizers pass over what has none: no step, no momentum, no weight decay.
So nothing must be rebuilt when freezing ends, and which epoch that is can be read from the epoch alone, in a resumed
training as in an uninterrupted one. Switching ``requires_grad`` instead, as Swin-UMamba's published trainer does, stops
DistributedDataParallel with an error, or lets its processes drift apart without one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def backward(loss: Tensor, network: nn.Module, frozen: Iterable[nn.Parameter]) -> None:
    """``loss.backward()`` that leaves no gradient in ``frozen``.

    It goes between the forward pass and whatever looks at gradients: unscaling, clipping, the optimizer's step. All
    gradients must have been reset before (``zero_grad(set_to_none=True)``).

    In a single process, gradients of frozen parameters are not computed. Those of the activations still are, as
    something that trains may come before the frozen part; the result is the same bit by bit. In a distributed
    training they are computed and then dropped: its processes have agreed to exchange all of them, and wait for each
    other until all are there. A network compiled by torch.compile computes them, too.

    A frozen part is in training mode like the rest: stochastic depth acts, and batch norms keep their statistics
    current.

    Args:
        loss: a scalar, scaled if a gradient scaler is in use.
        network: what is trained, with its wrappers if it has any.
        frozen: parameters of ``network``; at least one other must be left to train.
    """
    frozen = set(frozen)
    if not frozen or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in frozen:
            parameter.grad = None
    else:
        trained = [p for p in network.parameters() if p.requires_grad and p not in frozen]
        loss.backward(inputs=trained)  # type: ignore[no-untyped-call]
