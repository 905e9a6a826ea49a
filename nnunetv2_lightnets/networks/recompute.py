"""Training in little memory: a block keeps its input for the backward pass, and computes the rest again there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import ParamSpec, TypeVar, cast

import torch
from torch.utils.checkpoint import checkpoint

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_computing_again: ContextVar[bool] = ContextVar("computing_again", default=False)


def recomputed(
    block: Callable[_Arguments, _Result], *inputs: _Arguments.args, **settings: _Arguments.kwargs
) -> _Result:
    """``block(*inputs, **settings)``, of which nothing but the inputs is kept for the backward pass.

    There it is computed a second time, with the same batch statistics, so its gradients are the same to the bit. It
    must draw no random numbers. Batch norms inside are :class:`~nnunetv2_lightnets.networks.layers.BatchNorm`, which
    count each batch once.
    """
    if not torch.is_grad_enabled():
        return block(*inputs, **settings)
    # A compiler repeats no step that changes running statistics, and takes no context of ours.
    contexts = {} if torch.compiler.is_compiling() else {"context_fn": _contexts}
    again = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts, **settings)  # type: ignore[misc]
    return cast(_Result, again)


def computes_again() -> bool:
    """Whether what runs has run in the forward pass already."""
    return not torch.compiler.is_compiling() and _computing_again.get()


def _contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), _again()


@contextlib.contextmanager
def _again() -> Iterator[None]:
    token = _computing_again.set(True)
    try:
        yield
    finally:
        _computing_again.reset(token)
