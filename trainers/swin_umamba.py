"""Swin-UMamba's and Swin-UMamba†'s recipe (Liu et al., arXiv:2402.03302, and its published code at 2c1f72e).

The encoder starts from VMamba-Tiny's ImageNet weights and is frozen, but for its patch embedding, for 10 epochs.
AdamW with one group for all parameters (norms and biases decay, too, as published), a cosine from 1e-4 to 1e-6 over
all epochs, Dice and cross-entropy at four resolutions with weights .571, .286, .143 and 0 from fine to coarse. The
weight 0 is nnU-Net's (1e-6 where several GPUs train without compilation, so that every parameter has a gradient).
The published scores belong to epochs 100 to 350 of a schedule of 1000.

The ``...Scratch`` ablations start from random weights and freeze nothing; all else is the same. (The authors' own
ablation of Swin-UMamba† also switches deep supervision off, so that their comparison changes two things at once.)
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from nnunetv2_lightnets.nnunet.schedules import Cosine
from nnunetv2_lightnets.nnunet.trainer import LightNetsTrainer, variant
from nnunetv2_lightnets.pretrained import load_vmamba, vmamba_path


class nnUNetTrainerSwinUMamba(LightNetsTrainer):
    """Swin-UMamba as released, 59.9 M parameters, from ImageNet weights."""

    network_name = "swin_umamba"
    deep_supervision = True
    initial_lr = 1e-4
    weight_decay = 0.05
    optimizer_class = torch.optim.AdamW  # of all parameters, also of those that are frozen at first
    optimizer_kwargs = {"eps": 1e-5}
    schedule = Cosine(final_lr=1e-6)
    pretrained: ClassVar[bool] = True  # start from ImageNet weights, and freeze what they cover
    frozen_epochs: ClassVar[int] = 10  # for which the encoder does not move

    def initialize(self) -> None:
        """Build network, optimizer and loss, and remember that the weights are random."""
        super().initialize()
        self._drawn_weights = self._weight_versions()

    def _weight_versions(self) -> list[int]:
        """Counters that torch raises at each change of a weight: equal lists mean that nothing was loaded."""
        return [parameter._version for parameter in self.bare_network.parameters()]

    def on_train_start(self) -> None:
        """Load ImageNet weights into weights that are still random.

        They are not where a checkpoint was loaded, to continue a training or by ``-pretrained_weights``.

        Raises:
            LightNetsError: if the ImageNet weights cannot be loaded; the message says how to get them.
        """
        if not self.was_initialized:
            self.initialize()
        if self.pretrained and self._weight_versions() == self._drawn_weights:
            self.print_to_log_file(str(load_vmamba(self.bare_network, vmamba_path())))
        super().on_train_start()
        if self.pretrained and self.current_epoch < self.frozen_epochs:
            self.print_to_log_file(
                f"The encoder but for its patch embedding is frozen before epoch {self.frozen_epochs}"
            )

    def frozen_parameters(self) -> list[nn.Parameter]:
        """The pretrained part of the encoder in the first epochs, nothing later."""
        if not self.pretrained or self.current_epoch >= self.frozen_epochs:
            return []
        network = self.bare_network
        return [network.get_parameter(name) for name in network.frozen_parameters()]  # type: ignore[operator]

    def _get_deep_supervision_scales(self) -> list[list[float]]:
        """The network's own scales, which the plan does not know, for each axis.

        nnU-Net cannot make a target without pixels: a side keeps at least one.
        """
        scales: tuple[float, ...] = self.bare_network.deep_supervision_scales  # type: ignore[assignment]
        sides = self.configuration_manager.patch_size
        return [[scale if round(side * scale) else 1 / side for side in sides] for scale in scales]


class nnUNetTrainerSwinUMambaScratch(nnUNetTrainerSwinUMamba):
    """Swin-UMamba from random weights."""

    pretrained = False


# Ablation: from random weights, without the selective scans.
nnUNetTrainerSwinUMambaScratchNoScan = variant(nnUNetTrainerSwinUMambaScratch, "NoScan", scan=False)


class nnUNetTrainerSwinUMambaD(nnUNetTrainerSwinUMamba):
    """Swin-UMamba† as released, 27.5 M parameters, from ImageNet weights."""

    network_name = "swin_umamba_d"


class nnUNetTrainerSwinUMambaDScratch(nnUNetTrainerSwinUMambaD):
    """Swin-UMamba† from random weights."""

    pretrained = False
