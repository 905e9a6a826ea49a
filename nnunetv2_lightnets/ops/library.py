"""Definition of the operators in ``torch.ops.nnunetv2_lightnets``.

An operator is one node in a traced or compiled graph, picks its kernel when it runs, and so serves every device.

They are defined through ``torch.library.Library``: an operator of ``torch.library.custom_op`` takes twice as long to
call, and seconds at the first call, in which it imports the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError

NAMESPACE = "nnunetv2_lightnets"

WORKSPACE: dict[str, Callable[..., int]] = {}
"""Bytes that an operator allocates beside its results while it runs, by its name: a function of its arguments, which
may be fake, and of ``device``, the type of the device that is meant ("" for that of the tensors). An operator without
an entry allocates little."""

_library = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    gradient: Callable[..., Any],
) -> None:
    """Define an operator.

    Args:
        schema: Name, arguments and results, as torch writes schemas. Results must not share memory with arguments.
        kernel: Computes the results, on any device, without autograd.
        fake: Makes empty results of the same shapes, dtypes and strides.
        setup_context: Called as ``setup_context(ctx, inputs, output)``, saves what ``gradient`` needs.
        gradient: Called as ``gradient(ctx, *grad_outputs)``, returns a gradient or None for every argument.
    """
    name = f"{NAMESPACE}::{schema[: schema.index('(')]}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))  # type: ignore[no-untyped-call]
    _library.impl(name, _without_autocast(kernel), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(name, fake, lib=_library)
    torch.library.register_autograd(name, gradient, setup_context=setup_context, lib=_library)


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would reach into the kernel, and compute its matrix products in half precision."""

    @wraps(kernel)
    def run(first: Tensor, *others: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return kernel(first, *others)
        with torch.autocast(first.device.type, enabled=False):
            return kernel(first, *others)

    return run


def define_backward(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator that computes gradients, and refuses to be differentiated itself."""
    define(schema, kernel, fake, save_nothing, _refuse_double_backward)


def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The ``setup_context`` of an operator whose gradient needs nothing."""


def _refuse_double_backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    raise LightNetsError(
        f"operators of {NAMESPACE}: gradients of gradients are not available; call backward without create_graph=True"
    )
