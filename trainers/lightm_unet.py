"""LightM-UNet's recipe (Liao et al., arXiv:2403.05246, and its published code).

Adam with coupled weight decay, polynomial decay of the learning rate, Dice and cross-entropy on one output. The
paper trains for 100 epochs of 250 iterations; here nnU-Net's 1000 stay, so that a comparison with nnU-Net is fair
unless a suffix says otherwise (``nnUNetTrainerLightMUNet_100epochs`` is the paper's schedule). The published code
trains in float32; here nnU-Net's mixed precision stays on GPUs, with the scan itself in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA

from nnunetv2_lightnets.nnunet.trainer import LightNetsTrainer


class nnUNetTrainerLightMUNet(LightNetsTrainer):
    """LightM-UNet as published, width 32: 5.02 M parameters in 3D."""

    network_name = "lightm_unet"
    network_kwargs = {"width": 32}  # noqa: RUF012
    n_downsamplings = 3

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = 1e-4
        self.weight_decay = 1e-5

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """Adam (eps 1e-5) on all parameters and the polynomial schedule with exponent 0.9."""
        optimizer = torch.optim.Adam(
            self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay, eps=1e-5
        )
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, exponent=0.9)


class nnUNetTrainerLightMUNetS(nnUNetTrainerLightMUNet):
    """LightM-UNet at width 16: 1.34 M parameters in 3D."""

    network_kwargs = {"width": 16}  # noqa: RUF012


class nnUNetTrainerLightMUNetT(nnUNetTrainerLightMUNet):
    """LightM-UNet at width 8: 0.38 M parameters in 3D."""

    network_kwargs = {"width": 8}  # noqa: RUF012


class nnUNetTrainerLightMUNetDemo(nnUNetTrainerLightMUNetT, nnUNetTrainerNoDA):
    """Width 8 at a hundred times the paper's learning rate, for the few minutes of ``nnUNetv2_lightnets demo``.

    The paper's 1e-4 needs thousands of iterations to leave the start. There is no data augmentation: it pays in long
    trainings, and here it would take half of two cores. Take another trainer for data of your own.
    """

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = 1e-2


class nnUNetTrainerLightMUNetNoScan(nnUNetTrainerLightMUNet):
    """Control: LightM-UNet without the selective scan; what is left is its term ``D * u``, gated."""

    network_kwargs = {"width": 32, "scan": False}  # noqa: RUF012


class nnUNetTrainerLightMUNetSNoScan(nnUNetTrainerLightMUNet):
    """Control: width 16 without the selective scan."""

    network_kwargs = {"width": 16, "scan": False}  # noqa: RUF012


class nnUNetTrainerLightMUNetTNoScan(nnUNetTrainerLightMUNet):
    """Control: width 8 without the selective scan."""

    network_kwargs = {"width": 8, "scan": False}  # noqa: RUF012
