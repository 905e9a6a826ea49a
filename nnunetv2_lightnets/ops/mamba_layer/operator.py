"""The Mamba layer as an operator of torch: autograd, fake kernels and backends behind it.

The backend is chosen when a layer runs. Its gradient is computed by the same one, and by the same forced backend of the
scan, in whatever thread or compiled graph that happens: ``used``, a number in a tensor on the CPU, goes there.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.ops.library import WORKSPACE, define, define_backward
from nnunetv2_lightnets.ops.mamba_layer import by_torch, native
from nnunetv2_lightnets.ops.mamba_layer.record import TENSORS, Gradients, Layer
from nnunetv2_lightnets.ops.selective_scan.dispatch import NAMES, forced_backend, use_backend


class Backend(Protocol):
    """What the module of a backend offers; it gets only layers that have passed :meth:`Layer.check`."""

    def saved_numbers(self, layer: Layer) -> int:
        """How many numbers of states :meth:`forward` saves, as a rule; tensors may have no memory."""

    def fits(self, layer: Layer, states: Tensor) -> bool:
        """Whether :meth:`backward` can use these states; else they are of another backend, or room for some."""

    def workspace(self, layer: Layer, backwards: bool) -> int:
        """Bytes that a pass allocates beside its results; tensors may have no memory."""

    def forward(self, layer: Layer, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Output (B, L, Co), states (flat, empty without ``save``) and moments (B, groups, 2)."""

    def backward(self, layer: Layer, grad_out: Tensor, states: Tensor, moments: Tensor) -> Gradients:
        """Gradients of :meth:`Layer.tensors`, from what :meth:`forward` of the same backend has returned."""


# Who computes a layer, and which backend of the scan is forced meanwhile, "" for none; ``used`` is an index of it.
_USES: tuple[tuple[Backend, str], ...] = (
    (cast(Backend, native), ""),
    *((cast(Backend, by_torch), name) for name in ("", *NAMES)),
)


def _use(layer: Layer) -> int:
    """Index of the backend that computes a layer now."""
    forced = forced_backend()
    if forced in ("", native.NAME) and native.takes(layer):
        return 0
    return _USES.index((cast(Backend, by_torch), forced))


def _backend(layer: Layer) -> Backend:
    """The backend that computes a layer now."""
    return _USES[_use(layer)][0]


def arguments(layer: Layer) -> tuple[Any, ...]:
    """The fields of a layer, as the operators take them."""
    return tuple(getattr(layer, name) for name in _FIELDS)


_FIELDS = tuple(field.name for field in fields(Layer))
_N = len(TENSORS)
_LAYER = (
    "Tensor tokens, Tensor? group_weight, Tensor? group_bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor in_weight, Tensor conv_weight, Tensor conv_bias, Tensor x_weight, Tensor dt_weight, Tensor dt_bias, "
    "Tensor A_log, Tensor D, Tensor out_weight, Tensor? skip_scale, Tensor? proj_weight, Tensor? proj_bias, "
    "int groups, float group_eps, float norm_eps, ScalarType? low"
)


def layer_of(values: Any) -> Layer:
    """The layer whose fields are the first arguments of an operator."""
    return Layer(**dict(zip(_FIELDS, values, strict=False)))


def _forward(*values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer, (save, traced) = layer_of(values), values[-2:]
    layer.check()
    use = _use(layer)
    out, states, moments = _USES[use][0].forward(layer, save)
    if traced and save and states.numel() != (promised := _promised(layer, traced)):
        states = states.new_empty(promised)  # a graph relies on what the fake kernel promises
    return out, states, moments, torch.scalar_tensor(use, dtype=torch.uint8, device="cpu")


def _promised(layer: Layer, traced: bool) -> int:
    """How many numbers of states a graph relies on: those of torch's runs, but on a CPU what would be taken now."""
    known = not traced or layer.tokens.device.type == "cpu"
    return (_backend(layer) if known else cast(Backend, by_torch)).saved_numbers(layer)


def _forward_fake(*values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer, (save, traced) = layer_of(values), values[-2:]
    layer.check()
    states = layer.tokens.new_empty(_promised(layer, traced) if save else 0, dtype=layer.scan_dtype)
    return layer.new_output(), states, layer.new_moments(), torch.empty((), dtype=torch.uint8, device="cpu")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:_N], *output[1:])
    ctx.numbers = inputs[_N : len(_FIELDS)]


def _gradient(ctx: Any, grad_out: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    tensors, saved = ctx.saved_tensors[:_N], ctx.saved_tensors[_N:]
    gradients = torch.ops.nnunetv2_lightnets.mamba_layer_backward(grad_out, *tensors, *ctx.numbers, *saved)
    found = (None if tensor is None else grad for grad, tensor in zip(gradients, tensors, strict=True))
    return (*found, *(None for _ in (*ctx.numbers, "save", "traced")))


def _backward(grad_out: Tensor, *values: Any) -> tuple[Tensor, ...]:
    layer, (states, moments, used) = layer_of(values), values[-3:]
    layer.check()
    if grad_out.shape[:2] != layer.tokens.shape[:2]:
        raise LightNetsError(
            f"mamba_layer, backward: grad has shape {tuple(grad_out.shape)}, tokens have {tuple(layer.tokens.shape)}"
        )
    backend, forced = _USES[int(used)]
    with use_backend(forced) if forced else nullcontext():
        if not backend.fits(layer, states):  # as where a graph relies on more
            _, states, moments = backend.forward(layer, True)
        gradients = backend.backward(layer, grad_out, states, moments)
    return tuple(layer.tokens.new_empty(0) if x is None else x for x in gradients)


def _backward_fake(grad_out: Tensor, *values: Any) -> tuple[Tensor, ...]:
    layer = layer_of(values)
    return tuple(layer.tokens.new_empty(0) if x is None else torch.empty_like(x) for x in layer.tensors())


def workspace(*values: Any, device: str = "") -> int:
    """Bytes that ``mamba_layer`` allocates beside its results, on the tensors' device or on another type of device."""
    return _bytes(layer_of(values), False, device)


def backward_workspace(grad_out: Tensor, *values: Any, device: str = "") -> int:
    """The same for ``mamba_layer_backward``."""
    return _bytes(layer_of(values), True, device)


def _bytes(layer: Layer, backwards: bool, device: str) -> int:
    elsewhere = device not in ("", layer.tokens.device.type)
    if elsewhere or _backend(layer) is by_torch:
        return by_torch.workspace(layer, backwards, device)
    return _backend(layer).workspace(layer, backwards)


define(
    f"mamba_layer({_LAYER}, bool save, bool traced) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _save,
    _gradient,
)
define_backward(
    f"mamba_layer_backward(Tensor grad_out, {_LAYER}, Tensor states, Tensor moments, Tensor used) "
    f"-> ({', '.join(['Tensor'] * _N)})",
    _backward,
    _backward_fake,
)
WORKSPACE.update({"mamba_layer": workspace, "mamba_layer_backward": backward_workspace})
