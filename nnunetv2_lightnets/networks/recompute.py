"""Training in little memory: a block keeps its input for the backward pass, and computes the rest again there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_Result = TypeVar("_Result")


def recomputed(block: Callable[..., _Result], *inputs: Any) -> _Result:
    """``block(*inputs)``, of which nothing but the inputs is kept for the backward pass.

    There it is computed a second time, up to the last tensor that the backward pass needs: a block that ends in a
    convolution or a linear layer up to that layer's input, so that the steps which cost most are not repeated. It must
    draw no random numbers and leave its inputs as they are. Its batch norms are
    :class:`~nnunetv2_lightnets.networks.layers.BatchNorm`: they count each batch once, and normalise the second time
    with the moments of the first. Inside another such block it is a part of that.
    """
    if not torch.is_grad_enabled() or moments_of_block() is not None or torch.compiler.is_exporting():
        return block(*inputs)
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if not torch.compiler.is_compiling():  # a compiler repeats no step that changes running statistics
        moments = Moments()
        settings["context_fn"] = lambda: (_Computing(moments, again=False), _Computing(moments, again=True))
    return checkpoint(block, *inputs, **settings)


class Moments:
    """Mean and reciprocal standard deviation of each batch norm of a block, in order: noted first, then read."""

    def __init__(self) -> None:
        self._noted: list[tuple[Tensor, Tensor]] = []
        self._read: Iterator[tuple[Tensor, Tensor]] | None = None

    def start(self, again: bool) -> None:
        """Before the block is computed, the first time or again."""
        self._read = iter(self._noted) if again else None

    def batch_norm(self, x: Tensor, norm: nn.modules.batchnorm._BatchNorm) -> Tensor:
        """``norm``, which is in training, of ``x`` (B, C, *spatial)."""
        known = None if self._read is None else next(self._read)
        running = norm.running_mean, norm.running_var, norm.momentum
        if known is None and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        y, *moments = _BatchNorm.apply(x, norm.weight, norm.bias, norm.eps, running, known)
        if known is None:
            self._noted.append((moments[0], moments[1]))
        return cast(Tensor, y)


_moments: ContextVar[Moments | None] = ContextVar("moments", default=None)


def moments_of_block() -> Moments | None:
    """Those of the block that is computed, if it will be computed again; a compiler has ways of its own."""
    return None if torch.compiler.is_compiling() else _moments.get()


class _Computing:
    """Context in which a block is computed; it may be entered again."""

    def __init__(self, moments: Moments, again: bool) -> None:
        self._moments, self._again = moments, again

    def __enter__(self) -> None:
        self._moments.start(self._again)
        self._token = _moments.set(self._moments)

    def __exit__(self, *_: object) -> None:
        _moments.reset(self._token)


class _BatchNorm(torch.autograd.Function):
    """Batch norm in training. Where its moments are known it reads its input once, and updates no statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        running: tuple[Tensor, Tensor, float],
        known: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if known is None:
            mean, var, momentum = running
            y, mean, rstd = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
        else:
            mean, rstd = known
            y = F.batch_norm(x, mean, rstd.pow(-2) - eps, weight, bias, eps=eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.eps = eps
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *moments = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        backward = torch.ops.aten.native_batch_norm_backward
        return *backward(gradients[0], x, weight, None, None, *moments, True, ctx.eps, wanted), None, None, None
