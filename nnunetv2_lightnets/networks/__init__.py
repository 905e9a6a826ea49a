"""The networks. They know nothing of nnU-Net and can be used without it."""

from nnunetv2_lightnets.networks.inference import prepare_for_inference
from nnunetv2_lightnets.networks.lightm_unet import LightMUNet
from nnunetv2_lightnets.networks.monai_baselines import UNETR, SegResNet, SwinUNETR
from nnunetv2_lightnets.networks.registry import NetworkEntry, create_network, list_networks, network_entry
from nnunetv2_lightnets.networks.swin_umamba import SwinUMamba
from nnunetv2_lightnets.networks.swin_umamba_d import SwinUMambaD
from nnunetv2_lightnets.networks.ulite import ULite
from nnunetv2_lightnets.networks.ultralight_unet import UltraLightUNet
from nnunetv2_lightnets.networks.umamba import UMambaBot, UMambaEnc

__all__ = [
    "UNETR",
    "LightMUNet",
    "NetworkEntry",
    "SegResNet",
    "SwinUMamba",
    "SwinUMambaD",
    "SwinUNETR",
    "ULite",
    "UMambaBot",
    "UMambaEnc",
    "UltraLightUNet",
    "create_network",
    "list_networks",
    "network_entry",
    "prepare_for_inference",
]
