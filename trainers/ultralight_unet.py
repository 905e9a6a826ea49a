"""UltraLightUNet's recipe (Rahman and Marculescu; in 2D published as MK-UNet), adapted to nnU-Net's pipeline.

AdamW and one output, as published; the loss is nnU-Net's Dice and cross-entropy. The paper's learning rate is 1e-4 for
200 epochs at batch size 16; training scripts that circulate for the network take 5e-4 and a cosine. The latter is
taken here, down to 1e-6: the networks start from small random weights, and the cosine is a function of the epoch
alone, so that a resumed training goes on with the same values. The weight decay, 1e-4, is this project's choice.
"""

from __future__ import annotations

import torch

from nnunetv2_lightnets.nnunet.schedules import Cosine
from nnunetv2_lightnets.nnunet.trainer import LightNetsTrainer, variant


class nnUNetTrainerUltraLightUNet(LightNetsTrainer):
    """UltraLightUNet, variant "base": 0.32 M parameters in 2D, 0.46 M in 3D."""

    network_name = "ultralight_unet"
    network_kwargs = {"variant": "base"}
    n_downsamplings = 5
    initial_lr = 5e-4
    weight_decay = 1e-4
    optimizer_class = torch.optim.AdamW
    optimizer_kwargs = {}
    schedule = Cosine(final_lr=1e-6)


# Parameters in 2D and in 3D: T 0.03 M and 0.06 M, S 0.09 M and 0.17 M, M 1.15 M and 1.44 M, L 3.76 M and 4.30 M.
nnUNetTrainerUltraLightUNetT = variant(nnUNetTrainerUltraLightUNet, "T", variant="T")
nnUNetTrainerUltraLightUNetS = variant(nnUNetTrainerUltraLightUNet, "S", variant="S")
nnUNetTrainerUltraLightUNetM = variant(nnUNetTrainerUltraLightUNet, "M", variant="M")
nnUNetTrainerUltraLightUNetL = variant(nnUNetTrainerUltraLightUNet, "L", variant="L")
# Ablation: the largest kernel alone, so that the receptive field stays and the smaller kernels are gone.
nnUNetTrainerUltraLightUNetSingleKernel = variant(nnUNetTrainerUltraLightUNet, "SingleKernel", kernel_sizes=(5,))
