"""Runs the Triton kernels of the causal convolution in a process of its own, as triton_worker.py runs the scan's."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor
from triton_worker import _error, compiled

from nnunetv2_lightnets.ops import causal_conv1d, use_backend
from nnunetv2_lightnets.ops import causal_conv1d_torch as by_torch
from nnunetv2_lightnets.ops import causal_conv1d_triton as by_triton
from nnunetv2_lightnets.ops import triton_runtime as runtime

NAMES = ("out", "dx", "dweight", "dbias")


def _tokens(batch: int, channels: int, length: int, dtype: torch.dtype, layout: str, device: str = "cpu") -> Tensor:
    """Random (B, D, L), in one of several memory layouts."""
    if layout == "tokens":
        return torch.randn(batch, channels, length, dtype=dtype, device=device)
    if layout == "strided":  # neither axis has neighbours
        return torch.randn(batch, length, channels, 2, dtype=dtype, device=device)[..., 0].transpose(1, 2)
    if layout == "expanded":  # the same for all channels
        return torch.randn(batch, 1, length, dtype=dtype, device=device).expand(-1, channels, -1)
    wider = 2 * channels if layout == "slices" else channels  # one half of what a projection makes
    return torch.randn(batch, length, wider, dtype=dtype, device=device)[..., wider - channels :].transpose(1, 2)


def _arguments(
    batch: int,
    channels: int,
    length: int,
    width: int,
    *,
    dtype: str = "float64",
    layout: str = "channels",
    bias: bool = True,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias, whose parameters are in float32 at least."""
    kind = getattr(torch, dtype)
    compute = torch.float64 if kind == torch.float64 else torch.float32
    weight = torch.randn(channels, width, dtype=compute, device=device)
    offset = torch.randn(channels, dtype=compute, device=device) if bias else None
    return _tokens(batch, channels, length, kind, layout, device), weight, offset


def errors(
    *, silu: bool = True, tile: int | None = None, programs: int = 16, grad_layout: str = "channels", **case: Any
) -> dict[str, Any]:
    """Errors of output and gradients against torch's operations in float64; checks dtypes and layouts on the way."""
    torch.manual_seed(0)
    by_triton.PROGRAMS = programs
    x, weight, bias = _arguments(**case)
    grad = _tokens(*x.shape, x.dtype, grad_layout)
    chosen = None if tile is None else (by_triton.ROWS if by_triton._rows(x) else by_triton.COLUMNS)[tile]
    found = (
        by_triton.forward(x, weight, bias, silu, chosen),
        *by_triton.backward(grad, x, weight, bias, silu, chosen),
    )
    doubles = (x.double(), weight.double(), None if bias is None else bias.double(), silu)
    wanted = (by_torch.forward(*doubles), *by_torch.backward(grad.double(), *doubles))
    for y in found[:2]:
        assert y is not None and y.dtype == x.dtype and y.stride() == torch.empty_like(x).stride()
    assert found[2] is not None and found[2].dtype == weight.dtype and (found[3] is None) == (bias is None)
    return {
        name: _error(y, z) for name, y, z in zip(NAMES, found, wanted, strict=True) if y is not None and z is not None
    }


def wide_stride_errors(axis: int) -> dict[str, float]:
    """Errors where images, channels or tokens are so far apart in memory that offsets exceed 32 bits."""
    torch.manual_seed(0)
    shape = (3, 3, 5)
    weight, bias = torch.randn(3, 4), torch.randn(3)
    strides = [[15, 5, 1], [15, 1, 3], [3, 1, 9]][axis]
    strides[axis] = 2**30 + 8
    memory = torch.empty(sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1)
    apart = torch.as_strided(memory, shape, strides).copy_(torch.randn(shape))  # some pages of 8 to 16 GiB are touched
    near = apart.clone(memory_format=torch.contiguous_format)
    grad = torch.randn(shape)
    found = (by_triton.forward(apart, weight, bias, True), *by_triton.backward(grad, apart, weight, bias, True))
    wanted = (by_torch.forward(near, weight, bias, True), *by_torch.backward(grad, near, weight, bias, True))
    again = by_triton.backward(apart, near, weight, bias, True)  # the gradient's strides
    found, wanted = (*found, again[0]), (*wanted, by_torch.backward(near, near, weight, bias, True)[0])
    names = (*NAMES, "dx of a wide gradient")
    return {name: _error(x, y.double()) for name, x, y in zip(names, found, wanted, strict=True)}  # type: ignore[union-attr]


def same_bits() -> bool:
    """Whether gradients of a call of several programs are the same when it is repeated."""
    torch.manual_seed(0)
    x, weight, bias = _arguments(2, 9, 70, 4, dtype="float32")
    first, second = (by_triton.backward(x.sin(), x, weight, bias, True) for _ in range(2))
    return all(y is not None and z is not None and torch.equal(y, z) for y, z in zip(first, second, strict=True))


def public_errors(backend: str) -> dict[str, Any]:
    """The public function when a backend is forced: errors, and how many kernels it launches."""
    torch.manual_seed(0)
    leaves = [x.requires_grad_() for x in _arguments(2, 5, 40, 4) if x is not None]
    assert by_triton.unavailable(leaves[0].device) is None  # tried before launches are counted
    launches = []
    run = runtime.launch

    def count(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        launches.append(kernel.__name__)
        run(kernel, programs, arguments)

    results = []
    for name in (backend, "reference"):
        by_triton.runtime.launch = count if name == backend else run
        with use_backend(name):
            out = causal_conv1d(*leaves, activation="silu")
            results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    by_triton.runtime.launch = run
    return {
        "launches": launches,
        **{name: _error(x, y) for name, x, y in zip(NAMES, *results, strict=True)},
    }


def probe(spoil: str) -> str | None:
    """What the probe says where a result is wrong or fails."""
    kernel_run = by_triton.forward if spoil in ("output", "error") else by_triton.backward

    def wrong(*arguments: Any) -> Any:
        results = kernel_run(*arguments)
        if spoil == "error":
            raise RuntimeError("no kernel image is available\nfor execution")
        if spoil == "output":
            return results + 1e-3
        return tuple(y * (1.001 if name == spoil else 1) for name, y in zip(NAMES[1:], results, strict=True))

    setattr(by_triton, kernel_run.__name__, wrong)
    by_triton._proofs.clear()
    reason = by_triton.unavailable(torch.device("cpu"))
    setattr(by_triton, kernel_run.__name__, kernel_run)
    by_triton._proofs.clear()
    return reason


def taken() -> dict[str, bool]:
    """Which calls the kernels take in this process."""
    x, weight, _ = _arguments(1, 3, 5, 4)
    return {
        "usual": by_triton.takes(x, weight),
        "wide kernel": by_triton.takes(x, weight.repeat(1, 3)),
        "integers": by_triton.takes(x.int(), weight),
        "elsewhere": by_triton.takes(x.to("meta"), weight),
    }


def resources(capabilities: list[int], *, silu: bool = True, **case: Any) -> list[dict[str, Any]]:
    """Compile the kernels of a convolution for each GPU, with every tile; return what each one uses."""
    launches: list[tuple[Any, dict[str, Any]]] = []
    runtime.launch = lambda kernel, programs, arguments: launches.append((kernel, arguments))
    runtime.multiprocessors = lambda device: 108
    x, weight, bias = _arguments(**case, device="meta")
    for tile in by_triton.ROWS if by_triton._rows(x) else by_triton.COLUMNS:
        y = by_triton.forward(x, weight, bias, silu, tile)
        by_triton.backward(y, x, weight, bias, silu, tile)
    return compiled(launches, capabilities)


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(globals()[request.pop("function")](**request)), flush=True)
