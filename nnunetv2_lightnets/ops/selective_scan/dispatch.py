"""Which backend computes a call: the fastest that can, or the one that the user forces.

Where two fast ones can, on a GPU with both Triton and mamba-ssm, a measurement on that GPU decides once for plain and
once for directional scans (see ``measured.py``). Until then, and where nothing can be measured, Triton comes first: its
kernels take channels as neighbours in memory and read tokens where ``order`` says, while mamba-ssm's needs copies of
both. That is a default and not a result.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import cast

import torch

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.ops.selective_scan.backend import Backend
from nnunetv2_lightnets.ops.selective_scan.measured import faster
from nnunetv2_lightnets.ops.selective_scan.probe import KINDS, kind_of, small_scan
from nnunetv2_lightnets.ops.selective_scan.record import Scan
from nnunetv2_lightnets.ops.selective_scan.slow import slow_scan
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
    "hub": "hub",
}
NAMES = tuple(_MODULES)
# The fast backends of a device; what comes first among those that can is measured. Then "torch", wherever that is.
FAST = {"cuda": ("triton", "mamba_ssm"), "cpu": ("native",)}
ON_REQUEST = "hub"  # it downloads what it runs: only a call for which it is forced looks for it

_forced: ContextVar[str] = ContextVar("nnunetv2_lightnets_scan_backend", default="")
_announced: set[tuple[str, str]] = set()
_NOTHING = nullcontext()
_logger = logging.getLogger("nnunetv2_lightnets")


@cache
def _load(name: str) -> Backend | str:
    """The module of a backend, or the reason why it cannot be imported."""
    try:
        return cast(Backend, importlib.import_module(f"nnunetv2_lightnets.ops.selective_scan.{_MODULES[name]}"))
    except Exception as error:  # whatever an optional dependency does on import must not reach the caller
        return f"its module cannot be imported ({in_one_line(error)})"


def _find(name: str) -> Backend | str:
    """A backend that can run on this machine and its current GPU, or the reason why it cannot."""
    backend = _load(name)
    if isinstance(backend, str):
        return backend
    return backend.unavailable() or backend


def _current(device: torch.device | None) -> AbstractContextManager[object]:
    """Context in which a GPU is the current one; nothing is to be done for other devices."""
    if device is None or device.type != "cuda" or device.index is None:
        return _NOTHING
    return torch.cuda.device(device)


def available_backends(device: torch.device | None = None) -> dict[str, str | None]:
    """Every backend's name with None, or with the reason why it cannot run here. Nothing is downloaded for that.

    Args:
        device: The GPU that is meant, where there are several; None for the current one.
    """
    reasons: dict[str, str | None] = {}
    for name in _MODULES:
        with _current(device):
            backend = _not_looked_for() if name == ON_REQUEST else _find(name)
        reasons[name] = backend if isinstance(backend, str) else None
        if name in FAST["cuda"] and reasons[name] is None and torch.cuda.is_available():
            gpu = torch.device("cuda") if device is None else device
            reasons[name] = next(filter(None, (refusal(name, kind, gpu) for kind in KINDS)), None)
    return reasons


def _not_looked_for() -> str:
    if _forced_name() == ON_REQUEST:
        return "it is forced, and looked for when a scan runs"
    return f"not asked for; {ENVIRONMENT_VARIABLE}={ON_REQUEST} downloads it when a scan runs"


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
    name = _forced_name()
    if name:
        _check_name(name, ENVIRONMENT_VARIABLE)
    return name


def _forced_name() -> str:
    return _forced.get() or os.environ.get(ENVIRONMENT_VARIABLE, "")


def choose(scan: Scan, forced: str = "") -> Backend:
    """The backend for a call: the one that is forced, or the first of this device's that accepts.

    Args:
        scan: The scan.
        forced: A backend's name; "" for what :func:`forced_backend` says.

    Raises:
        LightNetsError: If the forced one cannot run here or refuses the call.
    """
    forced = forced or forced_backend()
    device = scan.u.device
    refusals: list[str] = []
    with _current(device):
        candidates = _accepting((forced,) if forced else FAST.get(device.type, ()), scan, refusals)
        if not candidates and not forced:
            candidates = _accepting(("torch",), scan, refusals)
        if not candidates:
            raise _refused(forced, device, refusals)
        backend = candidates[0]
        if len(candidates) > 1:
            backend = faster(candidates, kind_of(scan), scan.u.dtype, device)
        if (device.type, backend.NAME) not in _announced:
            _announce(device, backend.NAME, forced, "; ".join(refusals))
    return backend


def _accepting(names: Sequence[str], scan: Scan, refusals: list[str]) -> list[Backend]:
    """The backends that take a scan; why the others do not is added to ``refusals``."""
    found = []
    for name in names:
        backend = _find(name)
        if not isinstance(backend, str):
            backend = backend.refuses(scan) or backend
        if isinstance(backend, str):
            refusals.append(f"{name}: {backend}")
        else:
            found.append(backend)
    return found


def _refused(forced: str, device: torch.device, refusals: list[str]) -> LightNetsError:
    if not forced:
        return LightNetsError(f"no scan backend takes this call on {device.type}: {'; '.join(refusals)}")
    reason = refusals[0].removeprefix(f"{forced}: ")
    return LightNetsError(
        f"the forced scan backend {forced!r} cannot take this call: {reason}; "
        f"force another, or none (use_backend, {ENVIRONMENT_VARIABLE})"
    )


def refusal(name: str, kind: str, device: torch.device) -> str | None:
    """Why a backend does not take networks' scans of a kind on a device, None if it does."""
    with _current(device):
        backend = _find(name)
        return backend if isinstance(backend, str) else backend.refuses(small_scan(kind, device))


def fastest(names: Sequence[str], kind: str, device: torch.device) -> str:
    """Which of the fast backends that run on a device takes a kind of networks' scans; it may measure, as they do."""
    backends = [cast(Backend, _load(name)) for name in names]
    with _current(device):  # networks scan in float32, under autocast, too
        return faster(backends, kind, torch.float32, device).NAME


def announced(device: torch.device, name: str) -> None:
    """Do not log that a backend scans on a device: the user has been told."""
    _announced.add((device.type, name))


def _announce(device: torch.device, name: str, forced: str, refusals: str) -> None:
    """Log a choice, once for each device and backend; a slow one on a GPU where everybody sees it."""
    announced(device, name)
    if (device.type, name) == ("cuda", "torch") and not forced:
        _logger.warning("%s. Remedy: %s; `nnUNetv2_lightnets doctor` checks it", *slow_scan(device, refusals))
    else:
        why = "forced" if forced else refusals or "the fastest for this device"
        _logger.info("selective scan on %s: backend %r (%s)", device.type, name, why)
