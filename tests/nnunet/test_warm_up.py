"""Kernels are prepared before a training: the calls of a step, recorded without memory, are those of a real one."""

from __future__ import annotations

import io
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_lightnets.nnunet import warm_up as module
from nnunetv2_lightnets.nnunet.folders import temporary_folders
from nnunetv2_lightnets.nnunet.memory import memory_of
from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.nnunet.rehearsal import make_batch, make_trainer
from nnunetv2_lightnets.nnunet.warm_up import Calls, warm_up
from nnunetv2_lightnets.ops.selective_scan import dispatch
from nnunetv2_lightnets.trainers import find_trainer

CPU = torch.device("cpu")
CASES = [("nnUNetTrainerLightMUNetT", (16, 16, 16)), ("nnUNetTrainerSwinUMambaDScratch", (64, 64))]


def _trainer(name: str, patch: tuple[int, ...], folder: Path) -> Any:
    with redirect_stdout(io.StringIO()):
        return make_trainer(find_trainer(name), patch_setting(patch, 1, 2), 2, folder, CPU)


@pytest.mark.parametrize(("name", "patch"), CASES)
@pytest.mark.parametrize("mixed", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["mixed", "float32"])
def test_recorded_calls_are_those_of_a_step(name: str, patch: tuple[int, ...], mixed: bool) -> None:
    recorded, real = Calls(), Calls()
    with temporary_folders() as folder:
        trainer = _trainer(name, patch, folder)
        precision = torch.autocast("cpu", dtype=torch.bfloat16) if mixed else nullcontext()
        with precision:
            memory_of(trainer, recorded)
        batch = make_batch(trainer, patch, 2)
        with real, precision:
            trainer.train_step(batch)
    assert len(recorded) >= 4
    assert set(recorded._calls) == set(real._calls)


@pytest.mark.parametrize(("name", "patch"), CASES)
def test_every_call_is_made_once(name: str, patch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors of the same shapes and strides, forwards and backwards, and the user hears of it."""
    calls, made, said = Calls(), Calls(), []
    with temporary_folders() as folder:
        memory_of(_trainer(name, patch, folder), calls)
    monkeypatch.setattr(module, "FAST", {"cuda": dispatch.NAMES})  # in place of a GPU's: whatever runs here
    with made:
        warm_up(calls, CPU, said.append)
    assert set(calls._calls) <= set(made._calls)
    more = [arguments for key, (_, arguments) in made._calls.items() if key not in calls._calls]
    assert all(arguments[-2:] == (False, False) for arguments in more), (
        "forwards without saved states, as in validation"
    )
    assert said[0].startswith(f"preparing the GPU kernels of {len(calls)} different calls")
    assert said[-1].startswith("GPU kernels: ready after") and len(said) == 2


@pytest.mark.parametrize(("name", "patch"), CASES)
def test_slow_backends_are_not_called_for_nothing(name: str, patch: tuple[int, ...]) -> None:
    calls, made = Calls(), Calls()
    with temporary_folders() as folder:
        memory_of(_trainer(name, patch, folder), calls)
    with made:
        warm_up(calls, CPU, lambda line: None)  # where "native" or "torch" scans, of which nothing is compiled
    assert not any("scan" in name or "mamba_layer" in name for name, _ in made)


def test_an_error_is_told_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    name, patch = CASES[0]
    calls, said = Calls(), []
    with temporary_folders() as folder:
        memory_of(_trainer(name, patch, folder), calls)

    def fails(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(module, "_call", fails)
    warm_up(calls, CPU, said.append)
    assert sum("could not be prepared: CUDA out of memory" in line for line in said) == len(calls)
    assert said[-1].startswith("GPU kernels: ready")
