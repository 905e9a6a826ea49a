"""Before a training on a GPU: compile and tune all kernels that its steps will need, with a word to the user.

Kernels are compiled when they are first called, and their tiles chosen then: in the first step of a training, minutes
would go by in silence. So the calls of our operators in one step are recorded, on tensors that have no memory, and each
different one is made once, with random numbers. What is compiled and chosen is on disk for the next training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from nnunetv2_lightnets.files import last_line
from nnunetv2_lightnets.ops import causal_conv1d_triton, triton_runtime
from nnunetv2_lightnets.ops.library import NAMESPACE
from nnunetv2_lightnets.ops.selective_scan.dispatch import FAST, NAMES, choose
from nnunetv2_lightnets.ops.selective_scan.probe import small_scan
from nnunetv2_lightnets.ops.selective_scan.record import Scan

_SILENCE = 10.0  # seconds between two words to the user
_OPERATORS = (
    *("selective_scan", "selective_scan_backward", "causal_conv1d", "causal_conv1d_backward"),
    *("mamba_layer", "mamba_layer_backward"),
)


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records calls of our operators inside a ``with`` block, each that differs in shapes, strides or dtypes once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: dict[str, tuple[str, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if func.namespace == NAMESPACE and name in _OPERATORS:
            described = tree_map(lambda x: _Description(x) if isinstance(x, Tensor) else x, tuple(args))
            self._calls.setdefault(repr((name, described)), (name, described))
        return func(*args, **(kwargs or {}))

    def __iter__(self) -> Any:
        return iter(self._calls.values())

    def __len__(self) -> int:
        return len(self._calls)


class _Description:
    """Shape, strides, alignment and dtype of a tensor."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.strides, self.dtype = tuple(x.shape), x.stride(), x.dtype
        self.offset = int(x.storage_offset()) % 16

    def __repr__(self) -> str:
        return f"{self.shape} {self.strides} {self.offset} {self.dtype}"

    def real(self, device: torch.device) -> Tensor:
        """A tensor like the one described.

        One of integers is an order of tokens, each row a permutation, or the number of the backend, to be filled in.
        """
        if self.dtype == torch.uint8:
            return torch.zeros((), dtype=torch.uint8)
        if self.dtype == torch.int32:
            return torch.arange(self.shape[-1], dtype=torch.int32, device=device).repeat(self.shape[0], 1)
        reach = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        memory = torch.empty(self.offset + reach + 1, dtype=self.dtype, device=device).normal_(std=0.1)
        return memory.as_strided(self.shape, self.strides, self.offset)


def warm_up(calls: Calls, device: torch.device, say: Callable[[str], object]) -> None:
    """Make every call once; an error is told, and left to the training, which will meet it.

    Args:
        calls: What was recorded.
        device: A GPU.
        say: Takes a line for the user.
    """
    if device.type == "cuda" and triton_runtime.unavailable(device.index) is not None:
        return  # there is nothing to compile
    start = told = time.perf_counter()
    say(f"preparing the GPU kernels of {len(calls)} different calls (compiled once, and kept for the next training)")
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for i, (name, described) in enumerate(calls):
            try:
                _call(name, described, device)
            except Exception as error:  # such as too little memory
                say(f"GPU kernels: {name} could not be prepared: {last_line(error)}")
            if time.perf_counter() - told > _SILENCE:
                told = time.perf_counter()
                say(f"GPU kernels: {i + 1} of {len(calls)} calls prepared")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    say(f"GPU kernels: ready after {time.perf_counter() - start:.0f} s")


def _call(name: str, described: Iterable[Any], device: torch.device) -> None:
    arguments = [x.real(device) if isinstance(x, _Description) else x for x in described]
    if name.startswith("causal_conv1d"):
        x, weight = arguments[:2] if name == "causal_conv1d" else arguments[1:3]
        if device.type == "cuda" and not causal_conv1d_triton.takes(x, weight):
            return
    if name.startswith("selective_scan"):
        fields = arguments[:11] if name == "selective_scan" else arguments[2:13]
        scan = Scan(*fields)  # type: ignore[arg-type]
        scan.A.abs_().neg_()  # else states grow without bounds
        backend = choose(scan).NAME
        if backend not in FAST["cuda"]:
            return  # nothing of it is compiled
        if name == "selective_scan_backward":
            arguments[-1].fill_(NAMES.index(backend))
    if name.startswith("mamba_layer"):
        if choose(small_scan("plain", device)).NAME not in FAST["cuda"]:
            return
        if name == "mamba_layer_backward":  # what it is given is what a forward pass on this device leaves
            arguments[-3:] = torch.ops.nnunetv2_lightnets.mamba_layer(*arguments[1:-3], True, False)[1:]
    operator = getattr(torch.ops.nnunetv2_lightnets, name)
    operator(*arguments)
    if name == "selective_scan":
        operator(*arguments[:11], False, False)  # as in validation, which saves no states
