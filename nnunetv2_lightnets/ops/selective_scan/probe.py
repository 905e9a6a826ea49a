"""Whether a backend for GPUs gives correct results there: small scans of published shape, with all gradients.

A kernel that does not compile, or a compiler that gets it wrong, must show before the first step of a training. The
scans have all that those of the published networks have: 16 states, softplus, bias, D, a gate or two directions,
channels as neighbours in memory, B and C as slices, and several chunks, the last one short, so that a GPU cuts them
into segments.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import fields
from functools import cache

import torch
from torch import Tensor

from nnunetv2_lightnets.ops.selective_scan import reference
from nnunetv2_lightnets.ops.selective_scan.record import Gradients, Scan
from nnunetv2_lightnets.ops.tensors import in_one_line

KINDS = ("plain", "directional")
TOLERANCE = 1e-4  # of the largest value; float32 kernels are good to about 1e-6, and wrong ones are wrong by much more
_NAMES = ("output", "last state", *(f"gradient of {field.name}" for field in fields(Scan)[:9]))
_logger = logging.getLogger("nnunetv2_lightnets")

Forward = Callable[[Scan, bool], tuple[Tensor, Tensor, Tensor]]
Backward = Callable[[Scan, tuple[Tensor, Tensor | None], Tensor], Gradients]


def kind_of(scan: Scan) -> str:
    """Which of ``KINDS``."""
    return KINDS[scan.order is not None]


def small_scan(kind: str, device: torch.device | str, channels: int = 64, length: int = 200) -> Scan:
    """A scan in float32, the same on all devices."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(device)

    batch, states, rank = 2, 16, 2
    u, z, delta, other_delta = (random(batch, length, channels).mT for _ in range(4))  # (B, D, L), channels-last
    slices = random(batch, 1, length, rank + 2 * states)
    B, C = slices[..., rank : rank + states].mT, slices[..., rank + states :].mT
    A = -torch.arange(1.0, states + 1, device=device).expand(channels, states) * random(channels, 1).exp()
    if kind == "plain":
        return Scan(u, delta, A, B, C, random(channels), z, random(channels) - 2, delta_softplus=True)
    forwards = torch.arange(length, dtype=torch.int32, device=device)
    return Scan(
        u,
        torch.stack((delta.mT, other_delta.mT), 1).mT,  # (B, 2, D, L)
        torch.stack((A, A / 2)),
        torch.cat((B, C), 1),
        torch.cat((C, B), 1),
        random(2, channels),
        None,
        random(2, channels) - 2,
        None,
        torch.stack((forwards, forwards.flip(0))),
        delta_softplus=True,
    )


def results(scan: Scan, forward: Forward, backward: Backward) -> list[Tensor | None]:
    """Output, last state, and all gradients for a gradient of the output that is its sine."""
    out, last_state, states = forward(scan, True)
    return [out, last_state, *backward(scan, (out.sin(), None), states)]


@cache
def _expected(kind: str) -> list[Tensor | None]:
    scan = small_scan(kind, "cpu")
    double = (None if x is None else x.double() for x in scan.tensors())
    scan = Scan(*double, scan.order, scan.delta_softplus)  # type: ignore[call-arg, arg-type]
    return results(scan, reference.forward, reference.backward)


def difference(found: list[Tensor | None], expected: list[Tensor | None]) -> str | None:
    """The first result that is not as expected, None if there is none."""
    for name, x, wanted in zip(_NAMES, found, expected, strict=True):
        if wanted is None:
            continue
        if x is None:
            return f"there is no {name}"
        error = float((x.cpu().double() - wanted).abs().max() / wanted.abs().max())
        if not error < TOLERANCE:  # nor NaN
            return f"the {name} is wrong by {error:.1g} of its largest value"
    return None


def fault(backend: str, kind: str, forward: Forward, backward: Backward, device: torch.device) -> str | None:
    """Why a backend cannot be trusted with a kind of scans on a device, None if it can.

    It computes twice: what is compiled at the first call counts apart from the check in the time that is logged.

    Raises:
        torch.OutOfMemoryError: The device has too little free memory, which says nothing about the backend.
    """
    times = []
    for _ in range(2):
        start = time.perf_counter()
        try:
            reason = difference(results(small_scan(kind, device), forward, backward), _expected(kind))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers and drivers raise what they like
            return f"a small {kind} scan fails ({in_one_line(error)})"
        if reason is not None:
            return f"of a small {kind} scan, {reason}"
        times.append(time.perf_counter() - start)
    _logger.info(
        "scan backend %s on %s: %s scans and gradients are those of the reference (checked in %.2f s, after %.1f s)",
        *(backend, device, kind, times[1], times[0]),
    )
    return None
