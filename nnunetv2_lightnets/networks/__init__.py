"""The networks. They know nothing of nnU-Net and can be used without it.

Every network takes ``spatial_dims``, ``input_channels``, ``num_classes``, ``deep_supervision`` and settings of its own.
It maps images (B, C, *spatial) of any size to fresh logits (B, classes, *spatial). With deep supervision, which
``network.decoder.deep_supervision`` switches at any time, it returns a list of logits from fine to coarse; each side
of one is the image's side times its scale, rounded, and at least 1. The layers that make logits are
``network.decoder.seg_layers``; nothing else of the state dict depends on the number of classes.
"""

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
