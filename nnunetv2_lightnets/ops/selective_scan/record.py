"""One selective scan: the record that the operator, the dispatch and all backends pass on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.ops.tensors import compute_dtype, in_layout_of

CHUNK = 64
"""Tokens between two states that the forward pass saves for the backward pass."""

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Gradients = tuple[Tensor | None, ...]
"""Gradients of :meth:`Scan.tensors`, in their order; None where there is no such tensor."""


def n_chunks(length: int) -> int:
    """Chunks in a sequence of ``length`` tokens; the last one may be short."""
    return (length + CHUNK - 1) // CHUNK


@dataclass(frozen=True, slots=True)
class Scan:
    """Arguments of a scan, as :func:`nnunetv2_lightnets.ops.selective_scan` explains them.

    A plain scan has no ``order`` and no dimension K, and G groups of channels share B and C. A directional scan has an
    ``order`` and no gate; each of its K directions has coefficients of its own, in image order.
    """

    u: Tensor  # (B, D, L)
    delta: Tensor  # (B, [K,] D, L)
    A: Tensor  # ([K,] D, N)
    B: Tensor  # (B, G or K, N, L)
    C: Tensor  # (B, G or K, N, L)
    D: Tensor | None = None  # ([K,] D)
    z: Tensor | None = None  # (B, D, L)
    delta_bias: Tensor | None = None  # ([K,] D)
    initial_state: Tensor | None = None  # (B, [K,] D, N); None: zero
    order: Tensor | None = None  # (K, L), int32: image index of every direction's t-th token
    delta_softplus: bool = False

    def tensors(self) -> Tensors:
        """The tensors that have gradients."""
        return (self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias, self.initial_state)

    def gradients(self, *found: Tensor | None) -> Gradients:
        """``found`` for :meth:`tensors`, in the shape, dtype and memory layout of each."""
        return tuple(
            None if x is None or gradient is None else in_layout_of(x, gradient.reshape(x.shape))
            for x, gradient in zip(self.tensors(), found, strict=True)
        )

    @property
    def directions(self) -> int:
        """K; 1 in a plain scan."""
        return 1 if self.order is None else self.A.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic, the parameters and the states."""
        return self.A.dtype

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of the initial and the last state, (B, [K,] D, N)."""
        return (self.u.shape[0], *self.A.shape)

    @property
    def saved_numbers(self) -> int:
        """How many numbers are saved for the backward pass: the states (B, K, chunk, N, D) before all chunks."""
        return self.u.shape[0] * n_chunks(self.u.shape[2]) * self.A.numel()

    def with_directions(self) -> Scan:
        """The same scan with a dimension K in all tensors that can have one; in a plain scan K is 1."""
        if self.order is not None:
            return self
        return Scan(
            self.u,
            self.delta.unsqueeze(1),
            self.A.unsqueeze(0),
            self.B,
            self.C,
            None if self.D is None else self.D.unsqueeze(0),
            self.z,
            None if self.delta_bias is None else self.delta_bias.unsqueeze(0),
            None if self.initial_state is None else self.initial_state.unsqueeze(1),
            None,
            self.delta_softplus,
        )

    def check(self) -> None:
        """Make sure that all tensors fit each other in shape, dtype and device, so that no kernel reads beyond them.

        Raises:
            LightNetsError: If one does not fit. (What ``order`` holds is not looked at.)
        """
        _check_shape("u", self.u, (None, None, None))
        batch, channels, length = self.u.shape
        _check_shape("A", self.A, (channels, None) if self.order is None else (None, channels, None))
        *paths, _, state = self.A.shape
        _check_shape("delta", self.delta, (batch, *paths, channels, length))
        _check_shape("B", self.B, (batch, paths[0] if paths else None, state, length))
        groups = self.B.shape[1]
        _check_shape("C", self.C, (batch, groups, state, length))
        _check_shape("D", self.D, (*paths, channels))
        _check_shape("z", self.z, (batch, channels, length))
        _check_shape("delta_bias", self.delta_bias, (*paths, channels))
        _check_shape("initial_state", self.initial_state, (batch, *paths, channels, state))
        _check_shape("order", self.order, (*paths, length))
        if self.order is None and channels % groups:
            raise LightNetsError(
                f"selective scan: B has {groups} groups for {channels} channels; their number must divide the channels"
            )
        if self.order is not None and self.z is not None:
            raise LightNetsError("selective scan: z is given with an order; a directional scan has no gate")
        device, dtype = self.u.device, self.u.dtype
        for tensor in (self.delta, self.B, self.C, self.z):
            if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
                raise LightNetsError(
                    f"selective scan: got {tensor.dtype} on {tensor.device} beside u in {dtype} on {device}; "
                    f"call nnunetv2_lightnets.ops.selective_scan, which casts, and move all arguments to one device"
                )
        dtype = compute_dtype(self.u)
        for tensor in (self.A, self.D, self.delta_bias, self.initial_state):
            if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
                raise LightNetsError(
                    f"selective scan: got a parameter in {tensor.dtype} on {tensor.device}, needs {dtype} on {device}; "
                    f"call nnunetv2_lightnets.ops.selective_scan, which casts, and move all arguments to one device"
                )
        if self.order is not None and (self.order.dtype != torch.int32 or self.order.device != device):
            raise LightNetsError(
                f"selective scan: order is {self.order.dtype} on {self.order.device}; "
                f"it must be torch.int32 on {device}"
            )

    def check_gradients(self, grad_out: Tensor, grad_last_state: Tensor | None, states: Tensor) -> None:
        """The same for what comes with the scan into the backward pass.

        Raises:
            LightNetsError: If one does not fit.
        """
        _check_shape("the gradient of the output", grad_out, tuple(self.u.shape))
        _check_shape("the gradient of the last state", grad_last_state, self.state_shape)
        for tensor, dtype in ((grad_out, self.u.dtype), (grad_last_state, self.dtype), (states, self.dtype)):
            if tensor is not None and (tensor.dtype != dtype or tensor.device != self.u.device):
                raise LightNetsError(
                    f"selective scan, backward: got {tensor.dtype} on {tensor.device}, needs {dtype} on {self.u.device}"
                )


def saved_states(scan: Scan, states: Tensor, forward: Callable[[Scan, bool], tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """``states`` for a backward pass, or those of another forward pass if none were saved in the first.

    Raises:
        LightNetsError: If they are not as many as the scan's.
    """
    if not states.numel():
        states = forward(scan, True)[2]
    if states.numel() != scan.saved_numbers:
        raise LightNetsError(
            f"selective scan, backward: {states.numel()} numbers of states are given, {scan.saved_numbers} are needed"
        )
    return states


def _check_shape(name: str, tensor: Tensor | None, expected: tuple[int | None, ...]) -> None:
    """Compare a shape with the expected one, in which None stands for any positive size."""
    if tensor is None or tensor.shape == expected:
        return
    fits = tensor.dim() == len(expected) and all(
        size > 0 if wanted is None else size == wanted for size, wanted in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        wanted_shape = ", ".join("any" if size is None else str(size) for size in expected)
        raise LightNetsError(f"selective scan: {name} has shape {tuple(tensor.shape)}, expected ({wanted_shape})")
