"""A recipe that freezes a part, through the real training loop: with nnU-Net's data, checkpoints and `--c`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_commands import DATASET, NNUNet
from nnunetv2_lightnets.trainers.lightm_unet import nnUNetTrainerLightMUNetT

FROZEN_EPOCHS, EPOCHS = 2, 4


class FrozenEncoder(nnUNetTrainerLightMUNetT):
    """Everything but the decoder stands still at first."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = EPOCHS, 1, 1
        self.save_every = 1

    def frozen_parameters(self) -> list[nn.Parameter]:
        if self.current_epoch >= FROZEN_EPOCHS:
            return []
        return [p for name, p in self.bare_network.named_parameters() if not name.startswith("decoder.")]

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Not what is tested here."""

    def save_checkpoint(self, filename: str) -> None:
        """Also keep every epoch's."""
        super().save_checkpoint(filename)
        if filename.endswith("checkpoint_latest.pth"):
            shutil.copy(filename, Path(self.output_folder) / f"after_{self.current_epoch + 1}.pth")


def make(nnunet: NNUNet) -> FrozenEncoder:
    folder = nnunet.preprocessed / DATASET
    plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    description = json.loads((folder / "dataset.json").read_text())
    return FrozenEncoder(plans, "2d", 0, description, torch.device("cpu"))


@pytest.mark.slow
def test_frozen_then_trained_and_the_same_after_every_interruption(
    nnunet: NNUNet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for key, value in nnunet.environment.items():
        if key.startswith("nnUNet_"):
            monkeypatch.setenv(key, value)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")

    monkeypatch.setenv("nnUNet_results", str(tmp_path / "whole"))
    whole = make(nnunet)
    whole.run_training()
    kept = {n: Path(whole.output_folder) / f"after_{n}.pth" for n in range(1, EPOCHS)}
    history = [torch.load(file, weights_only=False)["network_weights"] for file in kept.values()]
    history.append(whole.network.state_dict())
    for epoch in range(1, EPOCHS):
        for name in dict(whole.network.named_parameters()):
            stood_still = torch.equal(history[epoch - 1][name], history[epoch][name])
            if not name.startswith("decoder."):
                assert stood_still == (epoch < FROZEN_EPOCHS), (epoch, name)
        assert not torch.equal(
            *(state["decoder.seg_layers.0.weight"] for state in (history[epoch - 1], history[epoch]))
        )

    for done, file in kept.items():
        monkeypatch.setenv("nnUNet_results", str(tmp_path / f"resumed after {done}"))
        torch.manual_seed(7)  # other random numbers than the first run has now
        np.random.seed(7)  # noqa: NPY002
        resumed = make(nnunet)
        resumed.load_checkpoint(str(file))
        assert resumed.current_epoch == done
        resumed.run_training()
        for name, tensor in whole.network.state_dict().items():
            assert torch.equal(tensor, resumed.network.state_dict()[name]), (done, name)
