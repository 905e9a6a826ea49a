"""What a training's user reads at its start: the scan's backend, and that the memory will not be enough."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_lightnets import list_networks
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks.mamba import Mamba
from nnunetv2_lightnets.nnunet import notices
from nnunetv2_lightnets.nnunet import trainer as trainer_module
from nnunetv2_lightnets.nnunet.available import available_memory
from nnunetv2_lightnets.nnunet.folders import temporary_folders
from nnunetv2_lightnets.nnunet.memory import memory_of, training_memory
from nnunetv2_lightnets.nnunet.notices import MEMORY_CHECK, check_memory, scan_backend, scan_notice
from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.nnunet.rehearsal import make_trainer
from nnunetv2_lightnets.nnunet.trainer_names import TRAINERS
from nnunetv2_lightnets.ops.selective_scan import dispatch, mamba_ssm, measured, slow, triton_scan
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
    monkeypatch.setattr(notices, "refusal", lambda name, kind, device: reasons[name])
    monkeypatch.setattr(slow, "slowdown", lambda device: 1234.5)


@pytest.fixture(autouse=True)
def _nothing_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_announced", set())


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cuda", "triton: no compiler; mamba_ssm: not installed"), ("cpu", "native: no kernel"), ("mps", "no faster one")],
)
def test_the_slow_scan_is_a_warning_with_its_reason(
    device: str, reason: str, monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any]
) -> None:
    without_fast_scans(monkeypatch)
    network = made("nnUNetTrainerLightMUNetT", [16, 16]).network
    notice = scan_notice(network, torch.device(device))
    assert notice is not None and notice.startswith(f"WARNING: selective scan on {device}: backend 'torch'")
    assert reason in notice and "\n" not in notice
    assert "takes 1,234 times as long as reading and writing its data once (measured here)" in notice
    assert "Remedy: " in notice and notice.endswith("nnUNetv2_lightnets doctor checks it")


def test_a_measurement_that_fails_stops_no_warning(
    monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """And what the notice has said, the scans do not say again."""
    without_fast_scans(monkeypatch)
    monkeypatch.setattr(slow, "slowdown", measured.slowdown)  # there is no such GPU here
    notice = scan_notice(made("nnUNetTrainerLightMUNetT", [16, 16]).network, torch.device("cuda", 7))
    assert notice is not None and "backend 'torch', many times slower than the one meant for this device" in notice
    monkeypatch.setattr(triton_scan, "unavailable", lambda: "no compiler")
    monkeypatch.setattr(mamba_ssm, "unavailable", lambda: "not installed")
    dispatch.choose(types.SimpleNamespace(u=types.SimpleNamespace(device=torch.device("cuda"))))  # type: ignore[arg-type]
    assert not caplog.records


@pytest.mark.parametrize("name", ["LightMUNetT", "UMambaBot", "SwinUMambaDScratch"])
def test_the_fast_scan_is_named(name: str, monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any]) -> None:
    backends = {"mamba_ssm": "none", "triton": None, "native": None}
    monkeypatch.setattr(notices, "refusal", lambda name, kind, device: backends[name])
    devices = [torch.device(name) for name in ("cuda", "cpu")]
    assert [scan_backend(device) for device in devices] == [("triton", None), ("native", None)]
    network = made(f"nnUNetTrainer{name}", [32, 32]).network
    assert scan_notice(network, torch.device("cuda")) == "selective scan on cuda: backend 'triton'"


def test_a_forced_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNUNET_LIGHTNETS_SCAN_BACKEND", "reference")
    name, slow = scan_backend(CPU)
    assert name == "reference" and slow is not None
    assert "it is forced" in slow[0] and slow[1] == "unset NNUNET_LIGHTNETS_SCAN_BACKEND"


@pytest.mark.parametrize("name", ["triton", "hub"])
def test_a_forced_fast_backend_is_named_and_not_looked_for(
    name: str, monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any]
) -> None:
    monkeypatch.setenv("NNUNET_LIGHTNETS_SCAN_BACKEND", name)
    monkeypatch.setattr(notices, "refusal", None)
    notice = scan_notice(made("nnUNetTrainerLightMUNetT", [16, 16]).network, torch.device("cuda"))
    assert notice == f"selective scan on cuda: backend {name!r} (forced)"


@pytest.mark.parametrize(
    ("trainer", "kind", "said"),
    [("LightMUNetT", "plain", "backend 'mamba_ssm'"), ("SwinUMambaDScratch", "directional", "backend 'triton'")],
)
def test_the_measured_backend_of_the_networks_kind_is_named(
    trainer: str, kind: str, said: str, monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any]
) -> None:
    asked = []

    def fastest(names: list[str], kind: str, device: torch.device) -> str:
        assert names == ["triton", "mamba_ssm"] and device.type == "cuda"
        asked.append(kind)
        return {"plain": "mamba_ssm", "directional": "triton"}[kind]

    monkeypatch.setattr(notices, "refusal", lambda name, kind, device: None)
    monkeypatch.setattr(notices, "fastest", fastest)
    network = made(f"nnUNetTrainer{trainer}", [32, 32]).network
    assert scan_notice(network, torch.device("cuda")) == f"selective scan on cuda: {said}"
    assert asked == [kind]
    both = torch.nn.ModuleList([network, Mamba(4)])
    if kind == "directional":
        assert scan_notice(both, torch.device("cuda")) == (
            "selective scan on cuda: backend 'mamba_ssm' for plain scans, backend 'triton' for directional scans"
        )


def _said(trainer: Any) -> list[str]:
    said: list[str] = []
    trainer.print_to_log_file = lambda *words, **_: said.append(" ".join(map(str, words)))
    return said


@pytest.mark.parametrize("starts", [["train"], ["validate"], ["train", "validate"]])
@pytest.mark.parametrize(("name", "times"), [("LightMUNetT", 1), ("ULite", 0)])
def test_the_log_names_the_backend_once(
    name: str, times: int, starts: list[str], monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any]
) -> None:
    """In trainings, and where only a validation is run."""
    without_fast_scans(monkeypatch)
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda self, save_probabilities: None)
    monkeypatch.setattr(trainer_module, "check_memory", lambda *_: "enough")
    trainer = made(f"nnUNetTrainer{name}", [32, 32])
    said = _said(trainer)
    for start in starts:
        trainer.on_train_start() if start == "train" else trainer.perform_actual_validation()
    assert sum("WARNING: selective scan on cpu: backend 'torch'" in line for line in said) == times
    assert sum("selective scan" in line for line in said) == times


def test_one_process_of_several_names_the_backend(
    monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    prepared: list[int] = []

    def warm_up(calls: Any, device: torch.device, say: Callable[[str], object]) -> None:
        prepared.append(len(calls))
        say("selective scan kernels")

    monkeypatch.setattr(trainer_module, "warm_up", warm_up)
    monkeypatch.setattr(notices, "available_memory", lambda device: 2**40)
    trainer = made("nnUNetTrainerLightMUNetT", [32, 32])
    said = _said(trainer)
    trainer.local_rank, trainer.device = 1, torch.device("cuda", 1)
    trainer.on_train_start()
    assert not any("selective scan" in line for line in said)
    assert len(prepared) == 1 and prepared[0] > 0, "it prepares its own GPU, in silence"
    for module in (triton_scan, mamba_ssm):
        monkeypatch.setattr(module, "unavailable", lambda: "not here")
    dispatch.choose(types.SimpleNamespace(u=types.SimpleNamespace(device=torch.device("cuda"))))  # type: ignore[arg-type]
    assert not caplog.records


def test_prediction_warns_once_in_the_terminal(
    monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing sets up a log in nnUNetv2_predict, and a progress bar is on the line."""
    logger = logging.getLogger("nnunetv2_lightnets")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", False)
    without_fast_scans(monkeypatch)
    for module in (triton_scan, mamba_ssm):
        monkeypatch.setattr(module, "unavailable", lambda: "no C compiler")
    trainer = made("nnUNetTrainerLightMUNetT", [32, 32])
    for _ in range(2):
        type(trainer).build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 3, False)
    assert len(logger.handlers) == 1 and not capsys.readouterr().err
    scan = types.SimpleNamespace(u=types.SimpleNamespace(device=torch.device("cuda")))
    for _ in range(3):
        dispatch.choose(scan)  # type: ignore[arg-type]
    error = capsys.readouterr().err
    assert error.startswith("WARNING: selective scan on cuda: backend 'torch', whose forward pass takes 1,234 times")
    assert "install gcc" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["nnUNetTrainerULite", "nnUNetTrainerLightMUNetTNoScan"])
def test_networks_without_a_scan_say_nothing_of_it(name: str, made: Callable[..., Any]) -> None:
    assert scan_notice(made(name, [32, 32]).network, CPU) is None


def test_too_little_memory_stops_with_numbers_and_remedies(
    monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any]
) -> None:
    trainer = made("nnUNetTrainerLightMUNet", [128, 128, 128])
    gigabytes: list[float] = [0.5]
    monkeypatch.setattr(notices, "available_memory", lambda device: int(gigabytes[0] * GB))
    started, random = time.process_time(), (torch.get_rng_state(), np.random.get_state()[1])  # noqa: NPY002
    with pytest.raises(LightNetsError) as stopped:
        check_memory(trainer)
    notice = str(stopped.value)
    assert notice.startswith("a training step on patches of 128 x 128 x 128 with batch size 2 takes about")
    assert "GB, and cpu has 0.5 GB" in notice and "\n" not in notice
    assert "(nnUNetTrainerLightMUNetS, nnUNetTrainerLightMUNetT)" in notice and "smaller batch size" in notice
    plans = trainer.plans_manager.plans_name
    plan = f"plan -d 999 -c free -tr nnUNetTrainerLightMUNet -p {plans} --memory 0.4 -device cpu --suffix 0_4GB"
    assert f"(nnUNetv2_lightnets {plan})" in notice
    assert time.process_time() - started < 20  # 4 s on a machine with nothing else to do
    assert torch.equal(random[0], torch.get_rng_state())
    assert np.array_equal(random[1], np.random.get_state()[1])  # noqa: NPY002
    counted = memory_of(trainer)
    needed = counted.total / GB
    assert f"takes about {needed:.1f} GB" in notice and 2 < needed < 45
    monkeypatch.setattr(notices, "memory_of", lambda *_: counted)
    monkeypatch.setenv(MEMORY_CHECK, "off")
    assert check_memory(trainer).startswith("WARNING: a training step on patches of 128 x 128 x 128")
    monkeypatch.delenv(MEMORY_CHECK)
    gigabytes[0] = needed - 0.5
    with pytest.raises(LightNetsError):
        check_memory(trainer)
    gigabytes[0] = needed + 0.5
    assert f"with batch size 2 takes about {needed:.1f} GB, and cpu has" in check_memory(trainer)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU that has 1 GB free, of whose used memory torch holds 0.5 GB, 0.2 of them in tensors."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GB // 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GB // 5)
    return torch.device("cuda", 1)


def test_what_is_free_on_a_gpu_counts(gpu: torch.device, made: Callable[..., Any]) -> None:
    assert available_memory(gpu) == GB + GB // 2 - GB // 5
    trainer = made("nnUNetTrainerULite", [64, 64, 64])
    trainer.device = gpu
    assert "and cuda has 1.3 GB" in check_memory(trainer)
    trainer.batch_size = 20  # of this process alone, where several train together
    with pytest.raises(
        LightNetsError, match=r"batch size 20 takes about .* --memory 1\.1 -device cuda --suffix 1_1GB\)"
    ):
        check_memory(trainer)


def test_networks_that_nnunets_plans_fit_get_its_command(
    monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any]
) -> None:
    trainer = made("nnUNetTrainerUMambaBot", [64, 64])
    monkeypatch.setattr(notices, "available_memory", lambda device: 2**24)
    with pytest.raises(LightNetsError) as stopped:
        check_memory(trainer)
    planned, prepared = str(stopped.value).partition("(nnUNetv2_plan")[2].partition(")")[0].split(", then ")
    assert re.fullmatch(
        r"_experiment -d 999 -pl \S+ -gpu_memory_target [\d.]+ -overwrite_plans_name \S+_[\d.]+GB", planned
    )
    assert re.fullmatch(r"nnUNetv2_preprocess -d 999 -plans_name \S+_[\d.]+GB -c free", prepared)


def test_what_is_held_is_not_asked_for_again(gpu: torch.device, made: Callable[..., Any]) -> None:
    """A training that continues has the optimizer's state on the GPU before its first step."""
    trainer = made("nnUNetTrainerULite", [64, 64, 64])
    held = sum(x.nbytes for x in notices._held(trainer))
    for parameter in trainer.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    parameters = sum(p.nbytes for p in trainer.network.parameters())
    assert held >= parameters and sum(x.nbytes for x in notices._held(trainer)) >= held + parameters


def test_a_training_that_does_not_fit_starts_nothing(monkeypatch: pytest.MonkeyPatch, made: Callable[..., Any]) -> None:
    started: list[Any] = []
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: started.append(self))
    monkeypatch.setattr(notices, "available_memory", lambda device: 2**20)
    trainer = made("nnUNetTrainerULite", [32, 32])
    with pytest.raises(LightNetsError):
        trainer.on_train_start()
    assert not started
    monkeypatch.setenv(MEMORY_CHECK, "off")
    said = _said(trainer)
    trainer.on_train_start()
    assert started and sum("cpu has 0.0 GB" in line for line in said) == 1


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
    def fail(*_: Any) -> None:
        raise RuntimeError("a page\nof words")

    monkeypatch.setattr(notices, "memory_of", fail)
    notice = check_memory(made("nnUNetTrainerULite", [32, 32]))
    assert notice == "the memory of a training step could not be estimated: RuntimeError: a page"


def test_memory_of_this_machine() -> None:
    found = available_memory(CPU)
    assert found is None or 2**28 < found < 2**50
    assert available_memory(torch.device("mps")) is None
    if Path("/proc/meminfo").exists():
        assert found is not None
