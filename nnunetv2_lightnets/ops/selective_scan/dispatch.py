"""Which backend computes a call: the fastest that can, or the one that the user forces."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Protocol, cast

from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.ops.selective_scan.record import Gradients, Scan
from nnunetv2_lightnets.ops.tensors import in_one_line

ENVIRONMENT_VARIABLE = "NNUNET_LIGHTNETS_SCAN_BACKEND"

# Names of the backends and the modules that hold them. A module is imported when its backend is first considered:
# Triton takes seconds to import, and a broken mamba-ssm must hurt nobody who does not use it.
_MODULES = {
    "mamba_ssm": "mamba_ssm",
    "triton": "triton_scan",
    "native": "native",
    "torch": "chunked",
    "reference": "reference",
}
NAMES = tuple(_MODULES)
_PREFERRED = {"cuda": ("mamba_ssm", "triton", "torch"), "cpu": ("native", "torch")}

_forced: ContextVar[str] = ContextVar("nnunetv2_lightnets_scan_backend", default="")
_announced: set[tuple[str, str]] = set()
_logger = logging.getLogger("nnunetv2_lightnets")


class Backend(Protocol):
    """What the module of a backend offers.

    ``forward`` and ``backward`` get only scans that have passed :meth:`Scan.check`, whose ``order`` holds permutations,
    and that the backend does not refuse. All results have the dtype and memory layout of ``torch.empty_like`` of the
    tensor that they belong to (the output: of ``u``); the last state is dense, in the dtype of computation.
    """

    NAME: str

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, None if it can."""

    def refuses(self, scan: Scan) -> str | None:
        """Why it cannot take this call, None if it can."""

    def forward(self, scan: Scan, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Output (B, D, L), last state (B, [K,] D, N), and what :meth:`backward` needs beside the scan.

        The latter are the states (B, K, chunk, N, D) before all chunks, flat; or empty without ``save_states``, and
        where a backend needs none.
        """

    def backward(self, scan: Scan, grads: tuple[Tensor, Tensor | None], states: Tensor) -> Gradients:
        """Gradients of the scan's tensors.

        Args:
            scan: The scan.
            grads: Gradients of the output, (B, D, L), and of the last state, (B, [K,] D, N).
            states: What :meth:`forward` of the same backend has saved; empty if it was not told to.
        """


@cache
def _load(name: str) -> Backend | str:
    """The module of a backend, or the reason why it cannot be imported."""
    try:
        return cast(Backend, importlib.import_module(f"nnunetv2_lightnets.ops.selective_scan.{_MODULES[name]}"))
    except Exception as error:  # whatever an optional dependency does on import must not reach the caller
        return f"its module cannot be imported ({in_one_line(error)})"


def _find(name: str) -> Backend | str:
    """A backend that can run on this machine, or the reason why it cannot."""
    backend = _load(name)
    if isinstance(backend, str):
        return backend
    return backend.unavailable() or backend


def available_backends() -> dict[str, str | None]:
    """Every backend's name with None, or with the reason why it cannot run on this machine."""
    found = {name: _find(name) for name in _MODULES}
    return {name: backend if isinstance(backend, str) else None for name, backend in found.items()}


def _check_name(name: str, source: str) -> None:
    if name not in _MODULES:
        raise LightNetsError(f"{source}: there is no scan backend {name!r}; use one of {', '.join(_MODULES)}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend for the scans of this thread (or task) inside the ``with`` block, and for their gradients.

    The backend is looked up when a scan runs, so a compiled or exported model obeys, too. Gradients are computed by it
    wherever and whenever they are asked for.

    Args:
        name: A key of :func:`available_backends`.

    Raises:
        LightNetsError: If there is no such backend; and, from a scan inside the block, if it cannot take the call.
    """
    _check_name(name, "use_backend")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str:
    """The backend that :func:`use_backend` or the environment forces here, "" if none."""
    name = _forced.get() or os.environ.get(ENVIRONMENT_VARIABLE, "")
    if name:
        _check_name(name, ENVIRONMENT_VARIABLE)
    return name


def choose(scan: Scan, forced: str = "") -> Backend:
    """The backend for a call: the one that is forced, or the first of this device's that accepts.

    Args:
        scan: The scan.
        forced: A backend's name; "" for what :func:`forced_backend` says.

    Raises:
        LightNetsError: If the forced one cannot run here or refuses the call.
    """
    forced = forced or forced_backend()
    device = scan.u.device.type
    refusals: list[str] = []
    for name in (forced,) if forced else _PREFERRED.get(device, ("torch",)):
        backend = _find(name)
        if not isinstance(backend, str):
            backend = backend.refuses(scan) or backend
        if not isinstance(backend, str):
            if (device, name) not in _announced:
                _announce(device, name, forced, "; ".join(refusals))
            return backend
        refusals.append(f"{name}: {backend}")
    if forced:
        reason = refusals[0].removeprefix(f"{forced}: ")
        raise LightNetsError(
            f"the forced scan backend {forced!r} cannot take this call: {reason}; "
            f"force another, or none (use_backend, {ENVIRONMENT_VARIABLE})"
        )
    raise LightNetsError(f"no scan backend takes this call on {device}: {'; '.join(refusals)}")


def _announce(device: str, name: str, forced: str, refusals: str) -> None:
    """Log a choice, once for each device and backend; a slow one on a GPU where everybody sees it."""
    _announced.add((device, name))
    if (device, name) == ("cuda", "torch") and not forced:
        _logger.warning(
            "selective scan on a GPU falls back to the slow backend 'torch' (%s). Triton comes with torch on Linux, "
            "and needs a C compiler (gcc) the first time it runs; `nnUNetv2_lightnets doctor` checks what is there",
            refusals,
        )
    else:
        why = "forced" if forced else refusals or "the fastest for this device"
        _logger.info("selective scan on %s: backend %r (%s)", device, name, why)
