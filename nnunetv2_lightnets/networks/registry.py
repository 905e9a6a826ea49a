"""The table of networks: one name for each, and no name twice."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from nnunetv2_lightnets.errors import LightNetsError

_Network = TypeVar("_Network", bound=type[nn.Module])


@dataclass(frozen=True)
class NetworkEntry:
    """What the registry knows of a network: its name, its class and the spatial dimensions it exists for."""

    name: str
    network_class: type[nn.Module]
    spatial_dims: tuple[int, ...]


_ENTRIES: dict[str, NetworkEntry] = {}


def register_network(name: str, *, spatial_dims: tuple[int, ...]) -> Callable[[_Network], _Network]:
    """Class decorator that enters a network under ``name``.

    Raises:
        ValueError: if the name is taken.
    """

    def register(network_class: _Network) -> _Network:
        if name in _ENTRIES:
            raise ValueError(f"network name {name!r} is taken by {_ENTRIES[name].network_class.__qualname__}")
        _ENTRIES[name] = NetworkEntry(name, network_class, spatial_dims)
        return network_class

    return register


def network_entry(name: str) -> NetworkEntry:
    """The registry's entry for ``name``.

    Raises:
        LightNetsError: if there is none; the message lists the nearest names, or all.
    """
    if name not in _ENTRIES:
        nearest = difflib.get_close_matches(name, _ENTRIES, n=3) or sorted(_ENTRIES)
        raise LightNetsError(f"there is no network {name!r}; did you mean {', '.join(nearest)}?")
    return _ENTRIES[name]


def list_networks(spatial_dims: int | None = None) -> list[str]:
    """Names of all networks, sorted; with ``spatial_dims`` (2 or 3) only those that exist in that dimension."""
    return sorted(name for name, entry in _ENTRIES.items() if spatial_dims in (None, *entry.spatial_dims))


def create_network(
    name: str,
    *,
    spatial_dims: int,
    input_channels: int,
    num_classes: int,
    deep_supervision: bool = False,
    **architecture: Any,
) -> nn.Module:
    """Build a network by its name.

    Args:
        name: one of :func:`list_networks`.
        spatial_dims: 2 for images (B, C, H, W), 3 for volumes (B, C, D, H, W).
        input_channels: channels of the input, at least 1.
        num_classes: channels of the output (logits), at least 1.
        deep_supervision: return a list of logits from fine to coarse instead of one tensor; only for networks
            published with it.
        **architecture: the network's own settings, see its class.

    Raises:
        LightNetsError: unknown name, a dimension the network does not exist in, or a setting it does not take.
    """
    entry = network_entry(name)
    if spatial_dims not in entry.spatial_dims:
        dims = " and ".join(f"{d}D" for d in entry.spatial_dims)
        others = ", ".join(n for n in list_networks(spatial_dims) if n != name)
        raise LightNetsError(
            f"{name} exists in {dims} only, not in {spatial_dims}D; {spatial_dims}D networks: {others}"
        )
    for label, value in (("input_channels", input_channels), ("num_classes", num_classes)):
        if value < 1:
            raise LightNetsError(f"{label} must be at least 1, got {value}")
    try:
        return entry.network_class(
            spatial_dims=spatial_dims,
            input_channels=input_channels,
            num_classes=num_classes,
            deep_supervision=deep_supervision,
            **architecture,
        )
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise LightNetsError(f"{name} does not take this setting: {error}") from error
        raise
