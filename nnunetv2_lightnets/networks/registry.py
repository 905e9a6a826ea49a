"""The table of networks: one name for each, no name twice, and what is checked before any network is built."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from torch import nn

from nnunetv2_lightnets.errors import LightNetsError

_Network = TypeVar("_Network", bound=type[nn.Module])


@dataclass(frozen=True)
class NetworkEntry:
    """What the registry knows of a network."""

    name: str
    network_class: type[nn.Module]
    spatial_dims: tuple[int, ...]  # the dimensions it exists in
    deep_supervision: bool  # whether it was published with outputs at several resolutions

    def check(self, settings: dict[str, Any]) -> None:
        """Refuse the settings that every network takes, where their values do not fit this one.

        Raises:
            LightNetsError: a dimension the network does not exist in, no channel or class, or deep supervision of a
                network with one output.
        """
        dims = settings["spatial_dims"]
        if dims not in self.spatial_dims:
            exists = " and ".join(f"{d}D" for d in self.spatial_dims)
            others = ", ".join(list_networks(dims)) or "none"
            raise LightNetsError(f"{self.name} exists in {exists} only, not in {dims}D; {dims}D networks: {others}")
        for label in ("input_channels", "num_classes"):
            if settings[label] < 1:
                raise LightNetsError(f"{self.name}: {label} must be at least 1, got {settings[label]}")
        if settings["deep_supervision"] and not self.deep_supervision:
            raise LightNetsError(
                f"{self.name} has one output, deep_supervision must be False; train it with its own trainer, or with "
                "one that has no deep supervision"
            )


_ENTRIES: dict[str, NetworkEntry] = {}


def register_network(
    name: str, *, spatial_dims: tuple[int, ...], deep_supervision: bool = False
) -> Callable[[_Network], _Network]:
    """Class decorator that enters a network under ``name``, and checks the arguments of its constructor.

    The constructor takes at least ``spatial_dims``, ``input_channels``, ``num_classes`` and ``deep_supervision``. It
    runs only with arguments that it has and that fit (:meth:`NetworkEntry.check`), whoever calls it.

    Raises:
        ValueError: if the name is taken.
    """

    def register(network_class: _Network) -> _Network:
        if name in _ENTRIES:
            raise ValueError(f"network name {name!r} is taken by {_ENTRIES[name].network_class.__qualname__}")
        entry = _ENTRIES[name] = NetworkEntry(name, network_class, spatial_dims, deep_supervision)
        network_class.__init__ = _checked(entry, network_class.__init__)  # type: ignore[method-assign]
        return network_class

    return register


def _checked(entry: NetworkEntry, constructor: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(constructor)
    own = [name for name in signature.parameters if name != "self"]

    @wraps(constructor)
    def checked(*args: Any, **settings: Any) -> None:
        if unknown := [setting for setting in settings if setting not in own]:
            raise LightNetsError(
                f"{entry.name} does not take this setting: {', '.join(unknown)}; its settings are {', '.join(own)}"
            )
        bound = signature.bind(*args, **settings)
        bound.apply_defaults()
        entry.check(bound.arguments)
        constructor(*args, **settings)

    return checked


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
    return network_entry(name).network_class(
        spatial_dims=spatial_dims,
        input_channels=input_channels,
        num_classes=num_classes,
        deep_supervision=deep_supervision,
        **architecture,
    )
