"""Recipes as tables: what each trainer changes of nnU-Net's, and optimizer and schedule as they are built from it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.nnunet.schedules import Cosine, Poly
from nnunetv2_lightnets.nnunet.trainer import LightNetsTrainer
from nnunetv2_lightnets.nnunet.trainer_names import TRAINERS
from nnunetv2_lightnets.trainers import find_trainer

ADAM, ADAMW, SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
RECIPES = {  # learning rate, weight decay, optimizer and its settings, schedule
    "nnUNetTrainerLightMUNet": (1e-4, 1e-5, ADAM, {"eps": 1e-5}, Poly(0.9)),
    "nnUNetTrainerLightMUNetDemo": (1e-2, 1e-5, ADAM, {"eps": 1e-5}, Poly(0.9)),
    "nnUNetTrainerULite": (2e-3, 0.0, ADAM, {"eps": 1e-8}, Poly(0.9)),
    "nnUNetTrainerUltraLightUNet": (5e-4, 1e-4, ADAMW, {"eps": 1e-8}, Cosine(1e-6)),
    "nnUNetTrainerSwinUMamba": (1e-4, 0.05, ADAMW, {"eps": 1e-5}, Cosine(1e-6)),
    "nnUNetTrainerSwinUMambaDScratch": (1e-4, 0.05, ADAMW, {"eps": 1e-5}, Cosine(1e-6)),
    "nnUNetTrainerUMambaBot": (1e-2, 3e-5, SGD, {"momentum": 0.99, "nesterov": True}, Poly(0.9)),
    "nnUNetTrainerSegResNet": (1e-4, 1e-5, ADAM, {"eps": 1e-5}, Poly(0.9)),
    "nnUNetTrainerUNETR": (1e-4, 0.01, ADAMW, {"eps": 1e-8}, Poly(1.0)),
    "nnUNetTrainerSwinUNETR": (8e-4, 0.01, ADAMW, {"eps": 1e-8}, Cosine(1e-6)),
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Maker of trainers on plans of a free patch, with a single weight for a network."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path))
    setting = patch_setting([32, 32], 1, 2)

    def make(name: str) -> Any:
        trainer = find_trainer(name)
        assert trainer is not None
        plans = setting.plans | {"continue_training": False}
        trainer = trainer(plans, setting.configuration, 0, setting.dataset_json, torch.device("cpu"))
        trainer.network = torch.nn.Linear(1, 1)
        return trainer

    return make


@pytest.mark.parametrize("name", RECIPES)
def test_the_optimizer_and_the_schedule_are_the_recipes(name: str, made: Any) -> None:
    initial_lr, weight_decay, optimizer_class, settings, schedule = RECIPES[name]
    trainer = made(f"{name}_200epochs")
    assert (trainer.initial_lr, trainer.weight_decay) == (initial_lr, weight_decay)
    optimizer, scheduler = trainer.configure_optimizers()
    assert type(optimizer) is optimizer_class
    (group,) = optimizer.param_groups
    expected = settings | {"lr": initial_lr, "weight_decay": weight_decay}
    assert {key: group[key] for key in expected} == pytest.approx(expected)
    assert len(group["params"]) == 2
    assert trainer.schedule == schedule
    for epoch in (0, 100, 199):
        scheduler.step(epoch)
        if isinstance(schedule, Poly):
            assert isinstance(scheduler, PolyLRScheduler)
            assert group["lr"] == pytest.approx(initial_lr * (1 - epoch / 200) ** schedule.exponent)
        else:
            share = (1 + float(torch.cos(torch.tensor(torch.pi * epoch / 200, dtype=torch.float64)))) / 2
            assert group["lr"] == pytest.approx(1e-6 + (initial_lr - 1e-6) * share)


def test_what_no_recipe_changes_is_nnunets(made: Any) -> None:
    ours, _ = made("nnUNetTrainerUMambaEnc").configure_optimizers()
    theirs, scheduler = made("nnUNetTrainer_1000epochs").configure_optimizers()
    assert type(ours) is type(theirs)
    assert [{k: v for k, v in g.items() if k != "params"} for g in ours.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in theirs.param_groups
    ]
    assert scheduler.exponent == Poly().exponent


def test_values_set_on_a_trainer_count(made: Any) -> None:
    """As in subclasses whose constructor sets them, which is nnU-Net's own way."""
    trainer = made("nnUNetTrainerULite")
    trainer.initial_lr, trainer.weight_decay = 3e-3, 0.5
    (group,) = trainer.configure_optimizers()[0].param_groups
    assert (group["lr"], group["weight_decay"]) == (3e-3, 0.5)


@pytest.mark.parametrize("file", sorted(set(TRAINERS.values())))
def test_no_recipe_repeats_a_constructor_or_an_optimizer(file: str) -> None:
    source = Path(__file__).resolve().parents[2] / "trainers" / f"{file}.py"
    defined = {node.name for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.FunctionDef)}
    assert not defined & {"__init__", "configure_optimizers"}


def test_every_recipe_is_one_of_these_or_inherits() -> None:
    for name in TRAINERS:
        trainer = find_trainer(name)
        assert trainer is not None
        if issubclass(trainer, LightNetsTrainer):
            assert {base.__name__ for base in trainer.__mro__} & set(RECIPES)
