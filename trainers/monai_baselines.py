"""Recipes of the MONAI baselines, as the published trainers of LightM-UNet have them; one output, no deep supervision.

SegResNet: Adam as LightM-UNet's. UNETR: AdamW, 1e-4, linear decay. SwinUNETR: AdamW, 8e-4, cosine to 1e-6. The
published trainers use float32; here nnU-Net's mixed precision stays on GPUs, as for all networks.
"""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_lightnets.nnunet.schedules import Cosine, Poly
from nnunetv2_lightnets.nnunet.trainer import LightNetsTrainer


class nnUNetTrainerSegResNet(LightNetsTrainer):
    """SegResNet."""

    network_name = "segresnet"
    initial_lr = 1e-4
    weight_decay = 1e-5
    optimizer_class = torch.optim.Adam
    optimizer_kwargs = {"eps": 1e-5}


class nnUNetTrainerUNETR(LightNetsTrainer):
    """UNETR for the plan's patch."""

    network_name = "unetr"
    initial_lr = 1e-4
    weight_decay = 0.01
    optimizer_class = torch.optim.AdamW
    optimizer_kwargs = {}
    schedule = Poly(exponent=1.0)

    @classmethod
    def planned_architecture(cls, configuration_manager: ConfigurationManager) -> dict[str, Any]:
        """The patch size."""
        return {"patch_size": configuration_manager.patch_size}


class nnUNetTrainerSwinUNETR(LightNetsTrainer):
    """SwinUNETR."""

    network_name = "swin_unetr"
    initial_lr = 8e-4
    weight_decay = 0.01
    optimizer_class = torch.optim.AdamW
    optimizer_kwargs = {}
    schedule = Cosine(final_lr=1e-6)
