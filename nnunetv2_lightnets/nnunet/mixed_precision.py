"""Automatic mixed precision as it is on CUDA, for tensors on the CPU: which operations compute in half precision.

A training step is counted without a GPU, on fake tensors of the CPU (see ``memory.py``). torch's autocast for CPUs
halves the same products and convolutions, but leaves in half precision what CUDA's computes in float32: norms, softmax,
exponentials, sums. These are corrected here, so that every tensor has the bytes that it has on a GPU.

Source: the lists in torch's manual, "Automatic Mixed Precision package", section "Autocast Op Reference".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from nnunetv2_lightnets.ops.tensors import as_on_gpu

# By the names of Python's functions; a name in torch, in torch.nn.functional and of a method is one entry.
_FLOAT32 = """
acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__ __rpow__
softplus layer_norm group_norm norm cosine_similarity nll_loss kl_div l1_loss smooth_l1_loss huber_loss
mse_loss cross_entropy binary_cross_entropy_with_logits dist cdist logsumexp softmax softmin log_softmax
cumprod cumsum prod sum interpolate
"""
_IN_FLOAT32 = frozenset(_FLOAT32.split())
_AS_THE_INPUT = frozenset(  # which the CPU's would compute in float32
    ["avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d", "max_pool3d", "max_pool3d_with_indices"]
)
_IN_HALF = frozenset(["prelu", "mv", "addmv", "addr"])  # which it would not touch


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """What ``torch.autocast("cuda")`` does to tensors on a GPU, here done to those on the CPU."""
    with as_on_gpu(), torch.autocast("cpu", dtype=torch.float16), _CudaRules():
        yield


def backward_under_cuda_rules(loss: Tensor) -> None:
    """``loss.backward()``, in which what is computed again follows the same rules.

    A checkpoint of torch switches autocast on again for that, and knows nothing of the rules here; and a mode is off
    inside of what it overrides, ``backward`` included. So the engine is called directly.
    """
    with as_on_gpu(), _CudaRules():
        run: Any = torch.autograd.graph._engine_run_backward
        ones = (torch.ones_like(loss),)
        run((loss,), ones, False, False, (), allow_unreachable=True, accumulate_grad=True)


class _CudaRules(TorchFunctionMode):
    """Corrects the autocast of CPUs, wherever that is on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        dtype = torch.float32 if name in _IN_FLOAT32 else torch.float16 if name in _IN_HALF else None
        if (dtype is None and name not in _AS_THE_INPUT) or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            if dtype is not None:
                args, kwargs = tree_map(lambda x: _cast(x, dtype), (args, kwargs))
            return func(*args, **kwargs)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    castable = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(dtype) if castable else x
