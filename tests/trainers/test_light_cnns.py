"""The recipes of U-Lite and UltraLightUNet: optimizer, schedule, strides from the plan, and training in 2D and 3D."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_commands import DATASET, NNUNet
from nnunetv2_lightnets.networks.layers import BatchNorm
from nnunetv2_lightnets.nnunet.prediction import PredictionNetwork
from nnunetv2_lightnets.trainers import find_trainer

PARAMETERS = {  # for one input channel and two classes, in 2D and 3D
    "nnUNetTrainerULite": (876_866, 885_986),
    "nnUNetTrainerUltraLightUNetT": (27_208 - 62, 61_933 + 5),
    "nnUNetTrainerUltraLightUNetS": (92_882 - 118, 165_291 + 9),
    "nnUNetTrainerUltraLightUNet": (315_414 - 230, 459_415 + 17),
    "nnUNetTrainerUltraLightUNetM": (1_150_046 - 454, 1_437_231 + 33),
    "nnUNetTrainerUltraLightUNetL": (3_758_062 - 902, 4_301_407 + 65),
}
NORMS = {"nnUNetTrainerULite": 11, "nnUNetTrainerUltraLightUNetT": 10 * 5 + 4 * 3}
CONFIGURATIONS = {"2d": [40, 48], "3d_fullres": [12, 32, 24]}


@pytest.fixture
def make_trainer(nnunet: NNUNet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Maker of trainers on real plans with small patches."""
    for key, value in nnunet.environment.items():
        if key.startswith("nnUNet_"):
            monkeypatch.setenv(key, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))

    def make(name: str, configuration: str, **plan_changes: Any) -> Any:
        folder = nnunet.preprocessed / DATASET
        plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
        changes = {"batch_size": 2, "patch_size": CONFIGURATIONS[configuration]} | plan_changes
        strides = changes.pop("strides", None)
        plans["configurations"][configuration].update(changes)
        if strides is not None:
            plans["configurations"][configuration]["architecture"]["arch_kwargs"]["strides"] = strides
        description = json.loads((folder / "dataset.json").read_text())
        trainer = find_trainer(name)
        assert trainer is not None
        return trainer(plans, configuration, 0, description, torch.device("cpu"))

    return make


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_every_trainer_builds_its_network(name: str, configuration: str, make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(name, configuration)
    trainer.initialize()
    count = PARAMETERS[name][configuration == "3d_fullres"]
    assert sum(p.numel() for p in trainer.network.parameters()) == count
    assert not trainer.enable_deep_supervision
    assert trainer.num_epochs == 1000


def test_ulite_takes_adam_and_a_polynomial_schedule(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer("nnUNetTrainerULite", "2d")
    trainer.initialize()
    assert type(trainer.optimizer) is torch.optim.Adam
    (group,) = trainer.optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (2e-3, 0.0, (0.9, 0.999))
    for epoch in (0, 400, 999):
        trainer.lr_scheduler.step(epoch)
        assert group["lr"] == pytest.approx(2e-3 * (1 - epoch / 1000) ** 0.9)


def test_ultralight_unet_takes_adamw_and_a_cosine(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer("nnUNetTrainerUltraLightUNetT", "2d")
    trainer.initialize()
    assert type(trainer.optimizer) is torch.optim.AdamW
    (group,) = trainer.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (1e-4, (0.9, 0.999))
    for epoch, lr in {0: 5e-4, 500: (5e-4 + 1e-6) / 2, 1000: 1e-6}.items():
        trainer.lr_scheduler.step(epoch)
        assert group["lr"] == pytest.approx(lr)


@pytest.mark.parametrize("name", ["nnUNetTrainerULite", "nnUNetTrainerUltraLightUNetT"])
def test_strides_are_the_plans(name: str, make_trainer: Callable[..., Any]) -> None:
    planned = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 1]]
    trainer = make_trainer(name, "3d_fullres", strides=planned)
    trainer.initialize()
    assert trainer.network.total_stride == (4, 8, 4)  # where the plan pools three times, the last two do not


@pytest.mark.parametrize(
    ("name", "configuration"),
    [
        ("nnUNetTrainerULite", "2d"),
        ("nnUNetTrainerUltraLightUNetT", "3d_fullres"),
        pytest.param("nnUNetTrainerULite", "3d_fullres", marks=pytest.mark.slow),
        pytest.param("nnUNetTrainerUltraLightUNetT", "2d", marks=pytest.mark.slow),
    ],
)
def test_training_lowers_the_loss_and_prediction_is_of_the_trained_network(
    name: str, configuration: str, make_trainer: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    trainer = make_trainer(name, configuration)
    trainer.initialize()
    shape = (2, 1, *CONFIGURATIONS[configuration])
    data = torch.randn(shape)
    batch = {"data": data, "target": (data > 0).float()}
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(25)]
    assert losses[-1] < losses[0] - 0.03
    # Trained and stored is the network with its norms, also after a validation step: only prediction prepares a copy.
    trainer.network.eval()
    trainer.validation_step(batch)
    modules = list(trainer.network.modules())
    assert not any(isinstance(module, PredictionNetwork) for module in modules)
    norms = sum(isinstance(module, BatchNorm) for module in modules)
    assert norms == NORMS[name]
    assert sum(key.endswith("running_mean") for key in trainer.network.state_dict()) == norms

    manager, plans = trainer.configuration_manager, trainer.plans_manager
    network = type(trainer).build_network_architecture(plans, manager, 1, 2, enable_deep_supervision=False)
    assert isinstance(network, PredictionNetwork)
    network.load_state_dict(trainer.network.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(data), trainer.network.eval()(data), rtol=0, atol=1e-4)
