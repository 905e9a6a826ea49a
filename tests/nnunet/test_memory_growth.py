"""A process that trains or predicts for long takes no more memory than one that has just begun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_lightnets import list_networks
from nnunetv2_lightnets.nnunet.trainer_names import TRAINERS
from nnunetv2_lightnets.trainers import find_trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to measure memory"),
]
MEASURE = """
import contextlib, gc, io, os, sys
import torch
from nnunetv2_lightnets.costs.worker import Job, predictor
from nnunetv2_lightnets.nnunet.folders import temporary_folders
from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.nnunet.rehearsal import make_batch, make_trainer
from nnunetv2_lightnets.trainers import find_trainer

name, side, first, last = sys.argv[1], *map(int, sys.argv[2:])
found, setting, device = find_trainer(name), patch_setting((side, side), 1, 3), torch.device("cpu")

def resident():
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def compare(run):
    for number in range(last):
        run(number)
        if number + 1 == first:
            before = resident()
    print("GREW", resident() / before)
"""
TRAIN = """
with temporary_folders() as folder, contextlib.redirect_stdout(io.StringIO()):
    trainer = make_trainer(found, setting, 2, folder, device)
batches = [make_batch(trainer, setting.patch, 2) for _ in range(4)]
trainer.network.train()
compare(lambda number: trainer.train_step(batches[number % 4]))
"""
PREDICT = """
with contextlib.redirect_stdout(io.StringIO()):
    predicting = predictor(found, Job(name, setting, 1, None, "cpu", 1, 0, False), device)
    predicting.list_of_parameters = [
        {key: value + fold for key, value in predicting.network.state_dict().items()} for fold in (0, 1e-3)
    ]
images = [torch.randn(1, 2, side + 16 * n, side + 8 * n) for n in range(4)]
compare(lambda number: predicting.predict_logits_from_preprocessed_data(images[number % 4]))
"""


def growth(what: str, *words: str) -> float:
    """Memory of a process at the end, as multiple of what it was at the beginning."""
    command = [sys.executable, "-c", MEASURE + what, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split("GREW")[1])


@pytest.mark.parametrize("network", list_networks(2))
def test_200_training_steps_take_what_20_take(network: str) -> None:
    name = next(name for name in TRAINERS if getattr(find_trainer(name), "network_name", None) == network)
    assert growth(TRAIN, name, "64", "20", "200") == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", ["nnUNetTrainerLightMUNetT", "nnUNetTrainerULite", "nnUNetTrainerSwinUMambaDScratch"])
def test_many_cases_take_what_a_few_take(name: str) -> None:
    """Of two folds, whose networks are prepared once and kept."""
    assert growth(PREDICT, name, "64", "8", "48") == pytest.approx(1, abs=0.01)
