"""A process that trains or predicts for long takes no more memory than one that has just begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from memory_growth import growth, prediction, training
from nnunetv2_lightnets import list_networks
from nnunetv2_lightnets.nnunet.trainer_names import TRAINERS
from nnunetv2_lightnets.trainers import find_trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to measure memory"),
]


@pytest.mark.parametrize("network", list_networks(2))
def test_200_training_steps_take_what_20_take(network: str) -> None:
    name = next(name for name in TRAINERS if getattr(find_trainer(name), "network_name", None) == network)
    assert growth(training, name, 20, 200) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", ["nnUNetTrainerLightMUNetT", "nnUNetTrainerULite", "nnUNetTrainerSwinUMambaDScratch"])
def test_many_cases_take_what_a_few_take(name: str) -> None:
    assert growth(prediction, name, 8, 48) == pytest.approx(1, abs=0.01)
