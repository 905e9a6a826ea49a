"""Learning-rate schedules of the recipes, beside nnU-Net's own ``PolyLRScheduler``."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LRScheduler


class CosineSchedule(LRScheduler):
    """Half a cosine from the optimizer's learning rate at epoch 0 to ``final_lr`` at ``num_epochs``.

    A function of the epoch alone, so that a resumed training goes on with the same values.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, num_epochs: int, final_lr: float) -> None:
        self.num_epochs = num_epochs
        self.final_lr = final_lr
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rate of ``epoch``; nnU-Net calls this at the start of each epoch."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        share = (1 + math.cos(math.pi * self.last_epoch / self.num_epochs)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.final_lr + (group["initial_lr"] - self.final_lr) * share
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
