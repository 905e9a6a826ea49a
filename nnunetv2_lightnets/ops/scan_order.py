"""Orders in which the pixels of an image are scanned.

Source: Liu et al., "VMamba: Visual State Space Model", arXiv:2401.10166, section 4.2 (cross-scan).
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.ops.library import define, save_nothing

Direction = tuple[Sequence[int], bool]
"""Axes of the image from the slowest to the fastest changing, and whether the path runs backwards."""

CROSS_SCAN: tuple[Direction, ...] = (((0, 1), False), ((1, 0), False), ((0, 1), True), ((1, 0), True))
"""VMamba's four directions: along rows, along columns, and both backwards."""

# Orders that are known to be permutations, and their versions.
_checked: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()

# Orders that scan_order has made, the one asked for last at the end, and their versions when they were made.
_kept: dict[tuple[object, ...], tuple[Tensor, int]] = {}
_MOST_KEPT = 64
_MOST_NUMBERS = 2**24  # of all kept, 64 MiB


def scan_order(
    shape: Sequence[int], directions: Sequence[Direction] = CROSS_SCAN, device: torch.device | str | None = None
) -> Tensor:
    """Image index of every direction's t-th token.

    Args:
        shape: Spatial shape of the image, such as (H, W) or (D, H, W).
        directions: For each direction, the image's axes from the slowest to the fastest changing along the path, and
            whether the path runs backwards. ``((0, 1), False)`` reads an image row by row, ``((1, 0), False)`` column
            by column; a volume's six directions are three axis orders, forwards and backwards.
        device: Where to put the result.

    Returns:
        (K, L) in int32, with ``L = prod(shape)``; every row is a permutation of ``range(L)``. Calls with the same
        arguments share a tensor, until somebody writes to it: clone it to change it.

    Raises:
        LightNetsError: If a direction does not name every axis of ``shape`` once.
    """
    if torch.compiler.is_compiling():
        order = _new_order(shape, directions, device)
        # What torch.export makes is looked at by whoever runs the program.
        traced = torch.compiler.is_dynamo_compiling()
        return torch.ops.nnunetv2_lightnets.known_order(order) if traced else order
    place = torch.empty(0, device=device)  # says which device None and "cuda" are
    if not _can_be_kept(place):
        order = _new_order(shape, directions, device)
        _checked[order] = _version(order)
        return order
    key = (tuple(shape), tuple((tuple(axes), backwards) for axes, backwards in directions), place.device)
    order, version = _kept.pop(key, (place, -1))
    if _version(order) != version:  # there is none, or it was written to
        with torch.inference_mode(False):  # for a training, too
            # A copy from the CPU is there when the call returns, for whatever stream of a GPU reads it next.
            order = _new_order(shape, directions, "cpu").to(place.device)
        _checked[order] = version = _version(order)
        _make_room(order.numel())
    if order.numel() <= _MOST_NUMBERS:
        _kept[key] = (order, version)
    return order


def _can_be_kept(made_here: Tensor) -> bool:
    """Whether tensors made here stay what they are: none of a tracer, nor of the memory of a CUDA graph's recording."""
    if type(made_here) is not Tensor or is_functorch_wrapped_tensor(made_here):
        return False
    return not (made_here.is_cuda and torch.cuda.is_current_stream_capturing())


def _make_room(numbers: int) -> None:
    """Forget the orders that nobody has asked for longest, until there is room for so many numbers."""
    entries = list(_kept.items())
    numbers += sum(order.numel() for _, (order, _) in entries)
    for place, (key, (order, _)) in enumerate(entries):
        if numbers <= _MOST_NUMBERS and len(entries) - place < _MOST_KEPT:
            break
        _kept.pop(key, None)
        numbers -= order.numel()


def _new_order(shape: Sequence[int], directions: Sequence[Direction], device: torch.device | str | None) -> Tensor:
    length = math.prod(shape)
    image = torch.arange(length, dtype=torch.int32, device=device).view(*shape)
    order = torch.empty(len(directions), length, dtype=torch.int32, device=device)
    for path, (axes, backwards) in zip(order, directions, strict=True):
        if sorted(axes) != list(range(len(shape))):
            raise LightNetsError(
                f"scan_order: direction {tuple(axes)} must name each of the {len(shape)} axes of {tuple(shape)} once"
            )
        tokens = image.permute(*axes).flatten()
        path.copy_(tokens.flip(0) if backwards else tokens)
    return order


def _known_order(order: Tensor) -> Tensor:
    """In a compiled graph, where tensors are new in every call: a copy that need not be looked at."""
    order = order.clone()
    _checked[order] = _version(order)
    return order


define("known_order(Tensor order) -> Tensor", _known_order, torch.empty_like, save_nothing, lambda ctx, grad: None)


def check_order(order: Tensor) -> None:
    """Make sure that every row of an order is a permutation, so that no kernel reads beyond an image.

    A tensor is looked at once, and again if it was written to since; the results of :func:`scan_order` are known. On a
    GPU, looking means waiting.

    Args:
        order: (K, L) in int32.

    Raises:
        LightNetsError: If it is not.
    """
    # A tensor made in inference mode does not tell whether it was written to: on CPUs it is looked at every time.
    if _checked.get(order) == _version(order) and not (order.is_cpu and order.is_inference()):
        return
    length = order.shape[1]
    smallest, largest = (int(x) for x in order.aminmax())
    if smallest < 0 or largest >= length:
        raise LightNetsError(
            f"order holds {smallest if smallest < 0 else largest}, which is no index of the {length} tokens; "
            f"make it by nnunetv2_lightnets.ops.scan_order"
        )
    seen = torch.zeros(order.shape, dtype=torch.bool, device=order.device).scatter_(1, order.long(), True)
    if not seen.all():
        row = int(seen.all(1).int().argmin())
        raise LightNetsError(
            f"order[{row}] holds some tokens twice and others not at all, it must be a permutation of range({length}); "
            f"make it by nnunetv2_lightnets.ops.scan_order"
        )
    _checked[order] = _version(order)


def _version(order: Tensor) -> int:
    return 0 if order.is_inference() else order._version
