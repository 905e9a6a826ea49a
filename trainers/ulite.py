"""U-Lite's recipe (Dinh et al., arXiv:2306.16103, and its published settings), adapted to nnU-Net's pipeline.

Adam with learning rate 2e-3 and no weight decay, as published. The paper halves the rate when the validation Dice has
not risen for 10 of 200 epochs. Such a schedule depends on the whole course of a training, which nnU-Net's checkpoints
do not hold, and its validation epochs are random patches; here the rate decays polynomially to zero, as a function of
the epoch alone. The paper's loss is one minus the Dice of the batch, here it is nnU-Net's Dice and cross-entropy; its
flips and rotations are among nnU-Net's augmentations. One output, no deep supervision, as published.
"""

from __future__ import annotations

import torch

from nnunetv2_lightnets.nnunet.trainer import LightNetsTrainer


class nnUNetTrainerULite(LightNetsTrainer):
    """U-Lite: 0.88 M parameters, in 2D as published, in 3D as this project lifts it."""

    network_name = "ulite"
    n_downsamplings = 5
    initial_lr = 2e-3
    weight_decay = 0.0
    optimizer_class = torch.optim.Adam
    optimizer_kwargs = {}
