"""Training in little memory: a block keeps its input for the backward pass, and computes the rest again there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunetv2_lightnets.ops.selective_scan.dispatch import forced_backend, use_backend

_Result = TypeVar("_Result")


def recomputed(block: Callable[..., _Result], *inputs: Any) -> _Result:
    """``block(*inputs)``, of which nothing but the inputs is kept for the backward pass.

    There it is computed a second time, up to the last tensor that the backward pass needs: a block that ends in a
    convolution or a linear layer up to that layer's input, so that the steps which cost most are not repeated. It must
    draw no random numbers and leave its inputs as they are. Its batch norms are
    :class:`~nnunetv2_lightnets.networks.layers.BatchNorm`: they count each batch once, and normalise the second time
    with the moments of the first. (A block with batch norms of several processes, as in distributed training, keeps
    all.) Inside another such block it is a part of that. Scans are computed again by the same backend.
    """
    if not torch.is_grad_enabled() or moments_of_block() is not None or is_recorded() or _is_synchronized(block):
        return block(*inputs)
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if not torch.compiler.is_compiling():  # a compiler repeats no step that changes running statistics
        moments, backend = Moments(block), forced_backend()
        settings["context_fn"] = lambda: (_Computing(moments), _Computing(moments, again=True, backend=backend))
    return checkpoint(block, *inputs, **settings)


def is_recorded() -> bool:
    """Whether an exporter records the steps, which knows only torch's own; torch 2.6 does not tell of the newer one."""
    exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
    return torch._C._get_tracing_state() is not None or exporting()


def _is_synchronized(block: Callable[..., Any]) -> bool:
    """Whether batch norms of a module, whose method a block is, take their moments from several processes."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    owner = getattr(block, "__self__", block)
    return isinstance(owner, nn.Module) and any(isinstance(m, nn.SyncBatchNorm) for m in owner.modules())


class Moments:
    """Mean and reciprocal standard deviation of each batch norm of a block, in order: noted first, then read."""

    def __init__(self, block: Callable[..., Any]) -> None:
        self.block = block
        self._noted: list[tuple[Tensor, Tensor]] = []
        self._read: Iterator[tuple[Tensor, Tensor]] | None = None

    @property
    def again(self) -> bool:
        """Whether the block is computed again just now, or was at last."""
        return self._read is not None

    def start(self, again: bool) -> None:
        """Before the block is computed, the first time or again."""
        self._read = iter(self._noted) if again else None

    def batch_norm(self, x: Tensor, norm: nn.modules.batchnorm._BatchNorm) -> Tensor:
        """``norm``, which is in training, of ``x`` (B, C, *spatial)."""
        known = None if self._read is None else next(self._read)
        momentum = norm.momentum
        if known is None and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            momentum = 1 / float(norm.num_batches_tracked) if momentum is None else momentum
        running = norm.running_mean, norm.running_var, momentum or 0.0
        y, *moments = _BatchNorm.apply(x, norm.weight, norm.bias, norm.eps, running, known)
        if known is None:
            self._noted.append((moments[0], moments[1]))
        return cast(Tensor, y)


_moments: ContextVar[Moments | None] = ContextVar("moments", default=None)


def moments_of_block() -> Moments | None:
    """Those of the block that is computed, if it will be computed again; a compiler has ways of its own."""
    return None if torch.compiler.is_compiling() else _moments.get()


def is_computed_again(block: Callable[..., Any]) -> bool:
    """Whether ``block`` is computed for the backward pass by itself: nobody reads the result of its last step."""
    moments = moments_of_block()
    return moments is not None and moments.again and moments.block == block


class _Computing:
    """Context in which a block is computed; it may be entered again."""

    def __init__(self, moments: Moments, again: bool = False, backend: str = "") -> None:
        self._moments, self._again, self._backend = moments, again, backend

    def __enter__(self) -> None:
        self._moments.start(self._again)
        self._token = _moments.set(self._moments)
        self._forced: AbstractContextManager[object] = use_backend(self._backend) if self._backend else nullcontext()
        self._forced.__enter__()

    def __exit__(self, *_: object) -> None:
        self._forced.__exit__(None, None, None)
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
