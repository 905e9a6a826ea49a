"""LightM-UNet's recipe (Liao et al., arXiv:2403.05246, and its published code).

Adam with coupled weight decay, polynomial decay of the learning rate, Dice and cross-entropy on one output. The
paper trains for 100 epochs of 250 iterations; here nnU-Net's 1000 stay, so that a comparison with nnU-Net is fair
unless a suffix says otherwise (``nnUNetTrainerLightMUNet_100epochs`` is the paper's schedule). The published code
trains in float32; here nnU-Net's mixed precision stays on GPUs, with the scan itself in float32.
"""

from __future__ import annotations

import torch
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA

from nnunetv2_lightnets.nnunet.trainer import LightNetsTrainer, variant


class nnUNetTrainerLightMUNet(LightNetsTrainer):
    """LightM-UNet as published, width 32: 5.02 M parameters in 3D."""

    network_name = "lightm_unet"
    network_kwargs = {"width": 32}
    n_downsamplings = 3
    initial_lr = 1e-4
    weight_decay = 1e-5
    optimizer_class = torch.optim.Adam
    optimizer_kwargs = {"eps": 1e-5}


class nnUNetTrainerLightMUNetDemo(nnUNetTrainerLightMUNet, nnUNetTrainerNoDA):
    """Width 8 at a hundred times the paper's learning rate, for the few minutes of ``nnUNetv2_lightnets demo``.

    The paper's 1e-4 needs thousands of iterations to leave the start. There is no data augmentation: it pays in long
    trainings, and here it would take half of two cores. Take another trainer for data of your own.
    """

    network_kwargs = {"width": 8}
    initial_lr = 1e-2


# Widths 16 and 8: 1.34 M and 0.38 M parameters in 3D.
nnUNetTrainerLightMUNetS = variant(nnUNetTrainerLightMUNet, "S", width=16)
nnUNetTrainerLightMUNetT = variant(nnUNetTrainerLightMUNet, "T", width=8)
# Ablations: without the selective scan; what is left is its term D * u, gated.
nnUNetTrainerLightMUNetNoScan = variant(nnUNetTrainerLightMUNet, "NoScan", scan=False)
nnUNetTrainerLightMUNetSNoScan = variant(nnUNetTrainerLightMUNetS, "NoScan", scan=False)
nnUNetTrainerLightMUNetTNoScan = variant(nnUNetTrainerLightMUNetT, "NoScan", scan=False)
