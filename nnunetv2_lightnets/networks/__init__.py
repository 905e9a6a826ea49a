"""The networks. They know nothing of nnU-Net and can be used without it."""

from nnunetv2_lightnets.networks.registry import NetworkEntry, create_network, list_networks, network_entry
from nnunetv2_lightnets.networks.ulite import ULite
from nnunetv2_lightnets.networks.ultralight_unet import UltraLightUNet

__all__ = ["NetworkEntry", "create_network", "list_networks", "network_entry"]
