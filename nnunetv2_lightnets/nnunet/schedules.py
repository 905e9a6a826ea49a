"""Learning-rate schedules of the recipes: functions of the epoch alone, so that a resumed training has the same rates.

A recipe names one as its ``schedule``; called with the optimizer, the first learning rate and the number of epochs, it
gives the scheduler whose ``step(epoch)`` nnU-Net calls at the start of each epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class Poly:
    """nnU-Net's own: ``initial_lr * (1 - epoch / num_epochs) ** exponent``."""

    exponent: float = 0.9

    def __call__(self, optimizer: torch.optim.Optimizer, initial_lr: float, num_epochs: int) -> LRScheduler:
        """The scheduler for a training of ``num_epochs``."""
        scheduler: LRScheduler = PolyLRScheduler(optimizer, initial_lr, num_epochs, exponent=self.exponent)
        return scheduler


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the optimizer's learning rate at epoch 0 to ``final_lr`` at the last."""

    final_lr: float

    def __call__(self, optimizer: torch.optim.Optimizer, _initial_lr: float, num_epochs: int) -> LRScheduler:
        """The scheduler for a training of ``num_epochs``."""
        return CosineSchedule(optimizer, num_epochs, self.final_lr)


class CosineSchedule(LRScheduler):
    """Half a cosine from the optimizer's learning rate at epoch 0 to ``final_lr`` at ``num_epochs``."""

    def __init__(self, optimizer: torch.optim.Optimizer, num_epochs: int, final_lr: float) -> None:
        self.num_epochs = num_epochs
        self.final_lr = final_lr
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rate of ``epoch``, by default the next one."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        share = (1 + math.cos(math.pi * self.last_epoch / self.num_epochs)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.final_lr + (group["initial_lr"] - self.final_lr) * share
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
