"""Backend "native": a whole Mamba layer on CPUs, in C."""

from __future__ import annotations

from torch import Tensor

from nnunetv2_lightnets.ops.mamba_layer.record import Gradients, Layer

NAME = "native"


def takes(layer: Layer) -> bool:
    """Whether the kernel is there and computes this layer. Asked about tensors without memory, too."""
    return False


def saved_numbers(layer: Layer) -> int:
    """How many numbers of states :func:`forward` saves."""
    raise NotImplementedError


def fits(layer: Layer, states: Tensor) -> bool:
    """Whether :func:`forward` would have saved so many numbers."""
    return states.numel() == saved_numbers(layer)


def workspace(layer: Layer, backwards: bool) -> int:
    """Bytes that a pass allocates beside its results."""
    raise NotImplementedError


def forward(layer: Layer, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, L, Co), states (flat, empty without ``save``) and moments (B, groups, 2)."""
    raise NotImplementedError


def backward(layer: Layer, grad_out: Tensor, states: Tensor, moments: Tensor) -> Gradients:
    """Gradients of :meth:`Layer.tensors`."""
    raise NotImplementedError
