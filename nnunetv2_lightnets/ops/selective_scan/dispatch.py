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
_PREFERRED = {"cuda": ("mamba_ssm", "triton", "torch"), "cpu": ("native", "torch")}
_PREFERRED_ELSEWHERE = ("torch",)

_forced: ContextVar[str] = ContextVar("nnunetv2_lightnets_scan_backend", default="")
_announced: set[tuple[str, str]] = set()
_logger = logging.getLogger("nnunetv2_lightnets")


class Backend(Protocol):
    """What the module of a backend offers; B and C are (B, G, N, L), or (B, K, N, L) in directional scans."""

    NAME: str

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, None if it can."""

    def refuses(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
    ) -> str | None:
        """Why it cannot take this call, None if it can."""

    def forward(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        save_states: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, last state, and the states (flat) that :meth:`backward` starts from."""

    def backward(
        self,
        grad_out: Tensor,
        grad_last_state: Tensor | None,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        states: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of u, delta, A, B, C, D, z and delta_bias; None where the argument is None."""

    def directional_forward(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        order: Tensor,
        save_states: bool,
    ) -> tuple[Tensor, Tensor]:
        """Output, and the states (flat) that :meth:`directional_backward` starts from."""

    def directional_backward(
        self,
        grad_y: Tensor,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        order: Tensor,
        states: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of u, delta, A, B, C, D and delta_bias; None where the argument is None."""


def in_one_line(error: Exception) -> str:
    """An error's type and the first line of its text; those of CUDA go on for many."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


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

    The backend is looked up when a scan runs, so a compiled or exported model obeys, too.

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
    name = _forced.get()
    if not name:
        name = os.environ.get(ENVIRONMENT_VARIABLE, "")
        if name:
            _check_name(name, ENVIRONMENT_VARIABLE)
    return name


def choose(
    forced: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> Backend:
    """The backend for a call: ``forced``, or the first of this device's that accepts.

    Raises:
        LightNetsError: If ``forced`` cannot run here or refuses the call.
    """
    if forced:
        backend = _find(forced)
        refusal = backend if isinstance(backend, str) else backend.refuses(u, delta, A, B, C, D, z, delta_bias)
        if refusal is not None or isinstance(backend, str):
            raise LightNetsError(
                f"the forced scan backend {forced!r} cannot take this call: {refusal}; "
                f"force another, or none (use_backend, {ENVIRONMENT_VARIABLE})"
            )
        return _announce(backend, u.device.type, "forced")
    refusals: list[str] = []
    for name in _PREFERRED.get(u.device.type, _PREFERRED_ELSEWHERE):
        backend = _find(name)
        refusal = backend if isinstance(backend, str) else backend.refuses(u, delta, A, B, C, D, z, delta_bias)
        if refusal is None and not isinstance(backend, str):
            return _announce(backend, u.device.type, "; ".join(refusals) or "the fastest for this device")
        refusals.append(f"{name}: {refusal}")
    raise LightNetsError(f"no scan backend takes this call on {u.device.type}: {'; '.join(refusals)}")


def _announce(backend: Backend, device: str, why: str) -> Backend:
    """Log the choice, once for each device and backend."""
    if (device, backend.NAME) not in _announced:
        _announced.add((device, backend.NAME))
        _logger.info("selective scan on %s: backend %r (%s)", device, backend.NAME, why)
    return backend
