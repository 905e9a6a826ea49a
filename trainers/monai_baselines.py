"""Recipes of the MONAI baselines, as the published trainers of LightM-UNet have them; one output, no deep supervision.

SegResNet: Adam as LightM-UNet's. UNETR: AdamW, 1e-4, linear decay. SwinUNETR: AdamW, 8e-4, cosine to 1e-6. The
published trainers use float32; here nnU-Net's mixed precision stays on GPUs, as for all networks.
"""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_lightnets.nnunet.schedules import CosineSchedule
from nnunetv2_lightnets.nnunet.trainer import LightNetsTrainer


class nnUNetTrainerSegResNet(LightNetsTrainer):
    """SegResNet: Adam (eps 1e-5), 1e-4, weight decay 1e-5, polynomial decay with exponent 0.9."""

    network_name = "segresnet"

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Adam on all parameters and the polynomial schedule."""
        self.initial_lr, self.weight_decay = 1e-4, 1e-5
        optimizer = torch.optim.Adam(self.network.parameters(), 1e-4, weight_decay=1e-5, eps=1e-5)
        return optimizer, PolyLRScheduler(optimizer, 1e-4, self.num_epochs, exponent=0.9)


class nnUNetTrainerUNETR(LightNetsTrainer):
    """UNETR for the plan's patch: AdamW, 1e-4, weight decay 0.01, linear decay."""

    network_name = "unetr"

    @classmethod
    def planned_architecture(cls, configuration_manager: ConfigurationManager) -> dict[str, Any]:
        """The patch size."""
        return {"patch_size": configuration_manager.patch_size}

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """AdamW on all parameters and the linear schedule."""
        self.initial_lr, self.weight_decay = 1e-4, 0.01
        optimizer = torch.optim.AdamW(self.network.parameters(), 1e-4, weight_decay=0.01)
        return optimizer, PolyLRScheduler(optimizer, 1e-4, self.num_epochs, exponent=1.0)


class nnUNetTrainerSwinUNETR(LightNetsTrainer):
    """SwinUNETR: AdamW, 8e-4, weight decay 0.01, cosine to 1e-6."""

    network_name = "swin_unetr"

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """AdamW on all parameters and the cosine schedule."""
        self.initial_lr, self.weight_decay = 8e-4, 0.01
        optimizer = torch.optim.AdamW(self.network.parameters(), 8e-4, weight_decay=0.01)
        return optimizer, CosineSchedule(optimizer, self.num_epochs, final_lr=1e-6)
