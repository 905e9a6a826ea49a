"""Backend "mamba_ssm": the CUDA kernel of the mamba-ssm package, where that is installed and works.

Only its compiled module ``selective_scan_cuda`` is used: the package around it imports much else, and fails where that
is missing. Builds of it fail in many ways, and the package can be installed without it. So the backend is available on
a GPU only after a plain and a directional scan and all their gradients have been right there.

The kernel keeps states every 2048 tokens in a form of its own. They are not passed on to the backward pass, which runs
the kernel's forward pass again (as the package itself does in its fused block).

Source: https://github.com/state-spaces/mamba (Apache-2.0), mamba_ssm/ops/selective_scan_interface.py for the interface.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from nnunetv2_lightnets.ops.selective_scan import chunked, probe
from nnunetv2_lightnets.ops.selective_scan.gather import with_orders, with_orders_backward
from nnunetv2_lightnets.ops.selective_scan.record import Gradients, Scan
from nnunetv2_lightnets.ops.tensors import in_layout_of, in_one_line

NAME = "mamba_ssm"
MODULE = "selective_scan_cuda"
DEVICE = "cuda"
MOST_STATES = 256
INSTALL = (
    "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall mamba-ssm "
    "(docs/installation.md)"
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Functions = tuple[Callable[..., Any], Callable[..., Any]]


class MambaKernel:
    """The backend's functions, for mamba-ssm's kernel from wherever it comes.

    Args:
        name: Of the backend.
        what: The kernel is called so in reasons.
        load: Returns the kernel's forward and backward function. It may raise anything, and is called once.
    """

    def __init__(self, name: str, what: str, load: Callable[[], Functions]) -> None:
        self.NAME = name
        self.forward, self.backward = with_orders(self._forward), with_orders_backward(self._backward)
        self._what, self._load = what, load
        self._functions: Functions | str | None = None
        self._faults: dict[int, str | None] = {}

    def forget(self) -> None:
        """Load and try the kernel again when it is next asked for."""
        self._functions = None
        self._faults.clear()

    def unavailable(self) -> str | None:
        """Why the kernel cannot run on the current GPU, None if it has computed scans and gradients correctly there."""
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        if self._functions is None:
            try:
                self._functions = self._load()
            except Exception as error:  # a broken build may fail in any way, and must only cost this backend
                self._functions = str(error) if isinstance(error, Missing) else self._broken(error)
        if isinstance(self._functions, str):
            return self._functions
        index = torch.cuda.current_device()
        if index not in self._faults:
            if torch.cuda.is_current_stream_capturing():
                return "it has not been tried on this GPU yet, and cannot be while a CUDA graph is recorded"
            device, compute = torch.device(DEVICE, index), (self.forward, self.backward)
            try:
                faults = [probe.fault(self.NAME, kind, *compute, device) for kind in probe.KINDS]
            except torch.OutOfMemoryError as error:  # it may be otherwise at the next call
                return f"{self._what}'s kernel cannot be checked on this GPU now ({in_one_line(error)})"
            self._faults[index] = next((f"{self._what}'s kernel: {fault}" for fault in faults if fault), None)
        return self._faults[index]

    def _broken(self, error: Exception) -> str:
        return f"{self._what}'s kernel cannot be loaded ({in_one_line(error)})"

    def refuses(self, scan: Scan) -> str | None:
        """Why the kernel cannot take this call, None if it can."""
        if scan.u.device.type != DEVICE:
            return f"u is on {scan.u.device}, and it computes on CUDA devices"
        if scan.u.dtype not in _DTYPES:
            return f"u is {scan.u.dtype}, and it reads float32, float16 and bfloat16"
        if scan.A.shape[-1] > MOST_STATES:
            return f"A has {scan.A.shape[-1]} states, and it takes up to {MOST_STATES}"
        if scan.initial_state is not None:
            return "an initial_state is given, and its scans start at zero"
        return None

    def _run(self, scan: Scan) -> tuple[tuple[Tensor | None, ...], Tensor, Tensor, Tensor]:
        """Arguments as the kernel reads them, gated output, output before the gate, and the kernel's own states."""
        u, delta, B, C, z = (None if x is None else _rows(x) for x in (scan.u, scan.delta, scan.B, scan.C, scan.z))
        A, D, delta_bias = (None if x is None else x.contiguous() for x in (scan.A, scan.D, scan.delta_bias))
        arguments = (u, delta, A, B, C, D, z, delta_bias)
        out, own_states, *gated = self._function(0)(*arguments, scan.delta_softplus)
        return arguments, gated[0] if gated else out, out, own_states

    def _function(self, index: int) -> Callable[..., Any]:
        assert isinstance(self._functions, tuple), "a backend that is unavailable was asked to compute"
        return self._functions[index]

    def _forward(self, scan: Scan, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Output (B, D, L) and last state (B, [K,] D, N); nothing is saved."""
        _, out, _, own_states = self._run(scan)
        last_state = own_states[:, :, -1, 1::2].clone()  # (B, D, N); decays and states alternate
        return in_layout_of(scan.u, out), last_state, scan.A.new_empty(0)

    def _backward(self, scan: Scan, grads: tuple[Tensor, Tensor | None], states: Tensor) -> Gradients:
        """Gradients of the scan's tensors."""
        grad_out, grad_last_state = grads
        if grad_last_state is not None:  # which the kernel does not take
            return chunked.backward(scan, grads, chunked.forward(scan, True)[2])
        arguments, _, out, own_states = self._run(scan)
        gate_output, gate_gradient, recompute_gated_output = None if scan.z is None else out, None, False
        du, ddelta, dA, dB, dC, dD, ddelta_bias, *dz = self._function(1)(
            *(*arguments, _rows(grad_out), own_states, gate_output, gate_gradient),
            *(scan.delta_softplus, recompute_gated_output),
        )
        return scan.gradients(du, ddelta, dA, dB, dC, dD, dz[0] if dz else None, ddelta_bias, None)


class Missing(Exception):
    """What a kernel's loader raises where its text is the whole reason."""


def _rows(x: Tensor) -> Tensor:
    """``x`` with tokens as neighbours in memory, as the kernel reads them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def installed() -> str | None:
    """The installed mamba-ssm's version, None if there is none."""
    try:
        return version("mamba-ssm")
    except PackageNotFoundError:
        return None


def without_scan() -> str | None:
    """What is wrong with an installed mamba-ssm that has no compiled scan; None if it has one, or is not installed.

    ``INSTALL`` is the remedy.
    """
    if (found := installed()) is None or importlib.util.find_spec(MODULE) is not None:
        return None
    return f"mamba-ssm {found} is installed without its scan (there is no module {MODULE})"


def _load() -> Functions:
    try:
        module = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        if error.name != MODULE:
            raise
        if (reason := without_scan()) is not None:
            raise Missing(f"{reason}; {INSTALL}") from error
        raise Missing(f"mamba-ssm is not installed ({MODULE} cannot be imported)") from error
    return module.fwd, module.bwd


_kernel = MambaKernel(NAME, "mamba-ssm", _load)
forward, backward, refuses, unavailable = _kernel.forward, _kernel.backward, _kernel.refuses, _kernel.unavailable
