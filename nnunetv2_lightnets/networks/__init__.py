"""The networks. They know nothing of nnU-Net and can be used without it."""

from nnunetv2_lightnets.networks.registry import NetworkEntry, create_network, list_networks, network_entry

__all__ = ["NetworkEntry", "create_network", "list_networks", "network_entry"]
