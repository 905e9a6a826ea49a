"""A trainer on data that only look preprocessed, and random batches: for measuring and counting training steps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nnunetv2_lightnets.nnunet.folders import PREPROCESSED
from nnunetv2_lightnets.nnunet.plans import Setting


def make_trainer(
    trainer_class: type[Any], setting: Setting, batch_size: int, folder: Path, device: torch.device
) -> Any:
    """The trainer as nnU-Net makes it, with network, optimizer and loss, on data that only look preprocessed.

    Args:
        trainer_class: a trainer of ours, or nnU-Net's.
        setting: plans and data set.
        batch_size: patches of a training step, instead of the plans'.
        folder: where nnU-Net's three folders are, see :func:`nnunetv2_lightnets.nnunet.folders.temporary_folders`.
        device: to train on.
    """
    plans = copy.deepcopy(setting.plans)
    plans["continue_training"] = False
    configuration = plans["configurations"][setting.configuration]
    configuration["batch_size"] = batch_size
    identifier = configuration.setdefault("data_identifier", "data")
    data = folder / PREPROCESSED / plans["dataset_name"] / identifier
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()  # tells nnU-Net the kind of data; never read
    trainer = trainer_class(plans, setting.configuration, 0, copy.deepcopy(setting.dataset_json), device)
    trainer.initialize()
    return trainer


def make_batch(trainer: Any, patch: Sequence[int], batch_size: int) -> dict[str, Any]:
    """Random data, and random labels for what the network answers."""
    data = torch.randn(batch_size, trainer.num_input_channels, *patch)
    with torch.no_grad(), autocast(trainer.device):
        # One patch is enough to see the shapes, and evaluation takes patches of any size.
        answers = trainer.network.eval()(data[:1].to(trainer.device))
    return {"data": data, "target": make_targets(trainer, answers, batch_size)}


def make_targets(trainer: Any, answers: Any, batch_size: int) -> Any:
    """Random labels at every resolution that the network answers in: one tensor, or a list under deep supervision."""
    several = isinstance(answers, (list, tuple))
    manager = trainer.label_manager
    targets = []
    for answer in answers if several else [answers]:
        spatial = answer.shape[2:]
        if manager.has_regions:
            shape = (batch_size, manager.num_segmentation_heads, *spatial)
            targets.append(torch.randint(0, 2, shape, dtype=torch.bool))
        else:
            shape = (batch_size, 1, *spatial)
            targets.append(torch.randint(0, manager.num_segmentation_heads, shape, dtype=torch.int16))
    return targets if several else targets[0]


def autocast(device: torch.device) -> torch.autocast:
    """Mixed precision where nnU-Net uses it: on CUDA."""
    return torch.autocast("cuda", enabled=device.type == "cuda")
