"""What a training's user reads at its start: the scan's backend, and that the memory will not be enough."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_lightnets import list_networks
from nnunetv2_lightnets.nnunet import notices
from nnunetv2_lightnets.nnunet.folders import temporary_folders
from nnunetv2_lightnets.nnunet.memory import memory_of, training_memory
from nnunetv2_lightnets.nnunet.notices import device_memory, memory_notice, scan_backend, scan_notice
from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.nnunet.rehearsal import make_trainer
from nnunetv2_lightnets.nnunet.trainer_names import TRAINERS
from nnunetv2_lightnets.trainers import find_trainer

CPU = torch.device("cpu")
GB = 2**30

QUICK = ("lightm_unet", "ulite", "ultralight_unet")  # the others are estimated in the slow tests


@pytest.fixture
def made() -> Iterator[Callable[..., Any]]:
    """Maker of initialized trainers on free patches, batch size 2."""
    with temporary_folders() as folder:

        def make(name: str, patch: list[int]) -> Any:
            with contextlib.redirect_stdout(io.StringIO()):
                trainer_class = find_trainer(name)
                assert trainer_class is not None
                return make_trainer(trainer_class, patch_setting(patch, 1, 3), 2, folder, CPU)

        yield make


def without_fast_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"mamba_ssm": "not installed", "triton": "no compiler", "native": "no kernel", "torch": None}
    monkeypatch.setattr(notices, "available_backends", lambda: reasons)


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cuda", "mamba_ssm: not installed; triton: no compiler"), ("cpu", "native: no kernel"), ("mps", "no faster one")],
)
def test_the_slow_scan_is_a_warning_with_its_reason(
    device: str, reason: str, monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any]
) -> None:
    without_fast_scans(monkeypatch)
    network = made("nnUNetTrainerLightMUNetT", [16, 16]).network
    notice = scan_notice(network, torch.device(device))
    assert notice is not None and notice.startswith(f"WARNING: selective scan on {device}: backend 'torch'")
    assert reason in notice


@pytest.mark.parametrize("name", ["LightMUNetT", "UMambaBot", "SwinUMambaDScratch"])
def test_the_fast_scan_is_named(name: str, monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any]) -> None:
    monkeypatch.setattr(notices, "available_backends", lambda: {"mamba_ssm": "none", "triton": None, "native": None})
    assert [scan_backend(device) for device in ("cuda", "cpu")] == [("triton", None), ("native", None)]
    network = made(f"nnUNetTrainer{name}", [32, 32]).network
    assert scan_notice(network, torch.device("cuda")) == "selective scan on cuda: backend 'triton'"


def test_a_forced_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNUNET_LIGHTNETS_SCAN_BACKEND", "reference")
    assert scan_backend("cpu") == ("reference", "it is forced")


@pytest.mark.parametrize("name", ["nnUNetTrainerULite", "nnUNetTrainerLightMUNetTNoScan"])
def test_networks_without_a_scan_say_nothing_of_it(name: str, made: Callable[..., Any]) -> None:
    assert scan_notice(made(name, [32, 32]).network, CPU) is None


def test_too_little_memory_is_a_warning_with_number_and_remedies(
    monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any]
) -> None:
    trainer = made("nnUNetTrainerLightMUNet", [128, 128, 128])
    monkeypatch.setattr(notices, "device_memory", lambda device: 40 * GB)
    started, random = time.process_time(), (torch.get_rng_state(), np.random.get_state()[1])  # noqa: NPY002
    notice = memory_notice(trainer)
    assert notice is not None and notice.startswith("WARNING: a training step on patches of 128 x 128 x 128")
    assert "takes about 44.4 GB, and cpu has 40.0 GB" in notice
    assert "--memory 40" in notice and "S or T" in notice and "smaller batch size" in notice
    assert time.process_time() - started < 20  # 4 s on a machine with nothing else to do
    assert torch.equal(random[0], torch.get_rng_state())
    assert np.array_equal(random[1], np.random.get_state()[1])  # noqa: NPY002
    monkeypatch.setattr(notices, "device_memory", lambda device: 80 * GB)
    assert memory_notice(trainer) is None


def test_the_trainer_is_left_as_it_is(made: Callable[..., Any]) -> None:
    trainer = made("nnUNetTrainerLightMUNetT", [32, 32])
    before = dict(vars(trainer))
    weights = {key: tensor.clone() for key, tensor in trainer.network.state_dict().items()}
    memory_of(trainer)
    assert vars(trainer) == before
    assert all(torch.equal(tensor, weights[key]) for key, tensor in trainer.network.state_dict().items())


@pytest.mark.parametrize(
    "network",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in list_networks(2)],
)
def test_every_network_can_be_estimated_and_as_the_planner_does(network: str, made: Callable[..., Any]) -> None:
    name = next(name for name in TRAINERS if getattr(find_trainer(name), "network_name", None) == network)
    trainer_class = find_trainer(name)
    assert trainer_class is not None
    assert memory_of(made(name, [64, 64])) == training_memory(trainer_class, patch_setting([64, 64], 1, 3), 2)


def test_an_estimate_that_fails_stops_nothing(monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any]) -> None:
    def fail(trainer: Any) -> None:
        raise RuntimeError("a page\nof words")

    monkeypatch.setattr(notices, "memory_of", fail)
    notice = memory_notice(made("nnUNetTrainerULite", [32, 32]))
    assert notice == "the memory of a training step could not be estimated: of words"


def test_memory_of_this_machine() -> None:
    found = device_memory(CPU)
    assert found is None or 2**28 < found < 2**50
    assert device_memory(torch.device("mps")) is None
    if Path("/proc/meminfo").exists():
        assert found is not None
