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
    """A trainer, ours or nnU-Net's, as nnU-Net makes it, with network, optimizer and loss, and this batch size.

    Its data, in ``folder`` (:func:`nnunetv2_lightnets.nnunet.folders.temporary_folders`), only look preprocessed.
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
    # A compiled network would be compiled for this one patch, and then for patches of any number.
    network = getattr(trainer.network, "_orig_mod", trainer.network)
    with torch.no_grad(), autocast(trainer.device):
        # One patch is enough to see the shapes, and evaluation takes patches of any size.
        answers = network.eval()(data[:1].to(trainer.device))
    return {"data": data, "target": make_targets(trainer, answers, batch_size)}


def make_targets(trainer: Any, answers: Any, batch_size: int) -> Any:
    """Random labels at every resolution that the network answers in: one tensor, or a list under deep supervision."""
    if isinstance(answers, (list, tuple)):
        return [make_targets(trainer, answer, batch_size) for answer in answers]
    heads = trainer.label_manager.num_segmentation_heads
    if trainer.label_manager.has_regions:
        return torch.randint(0, 2, (batch_size, heads, *answers.shape[2:]), dtype=torch.bool)
    return torch.randint(0, heads, (batch_size, 1, *answers.shape[2:]), dtype=torch.int16)


def autocast(device: torch.device) -> torch.autocast:
    """Mixed precision where nnU-Net uses it: on CUDA."""
    return torch.autocast("cuda", enabled=device.type == "cuda")
