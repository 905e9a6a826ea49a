"""Lightweight segmentation networks for nnU-Net.

Importing this package costs milliseconds: torch and nnU-Net are imported only when a network is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnunetv2_lightnets.errors import LightNetsError

if TYPE_CHECKING:
    from nnunetv2_lightnets.networks import create_network as create_network
    from nnunetv2_lightnets.networks import list_networks as list_networks

__version__ = "0.1.0"
__all__ = ["LightNetsError", "__version__", "create_network", "list_networks"]


def __getattr__(name: str) -> Any:
    if name in ("create_network", "list_networks"):
        from nnunetv2_lightnets import networks

        return getattr(networks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
