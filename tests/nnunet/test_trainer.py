"""LightNetsTrainer keeps nnU-Net's contract, and its own promises: atomic checkpoints, exact resume, no silent NaN."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_commands import DATASET, NNUNet
from nnunetv2_lightnets import files
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.nnunet.trainer import MAX_SKIPPED_STEPS, strides_from_plan
from nnunetv2_lightnets.trainers import find_trainer

TRAINER = "nnUNetTrainerLightMUNetT_3epochs_2iters"
CPU = torch.device("cpu")


@pytest.fixture
def make_trainer(nnunet: NNUNet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Maker of trainers on real plans, with results in the test's own folder and all work in this process."""
    for key, value in nnunet.environment.items():
        if key.startswith("nnUNet_"):
            monkeypatch.setenv(key, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")

    def make(name: str = TRAINER, configuration: str = "3d_fullres", **plan_changes: Any) -> Any:
        folder = nnunet.preprocessed / DATASET
        plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
        plans["configurations"][configuration].update(plan_changes)
        description = json.loads((folder / "dataset.json").read_text())
        trainer = find_trainer(name)
        assert trainer is not None
        return trainer(plans, configuration, 0, description, CPU)

    return make


def random_batch(trainer: Any) -> dict[str, torch.Tensor]:
    shape = (trainer.batch_size, 1, *trainer.configuration_manager.patch_size)
    return {"data": torch.randn(shape), "target": torch.randint(0, 2, shape).float()}


@pytest.mark.parametrize(
    ("pooling", "n", "strides"),
    [
        ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]], 3, ((2, 2, 2),) * 3),
        ([[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]], 3, ((1, 2, 2), (2, 2, 2), (2, 2, 2))),
        ([[1, 1], [2, 2]], 3, ((2, 2), (1, 1), (1, 1))),
    ],
)
def test_strides_follow_the_plan(pooling: list[list[int]], n: int, strides: tuple[tuple[int, ...], ...]) -> None:
    assert strides_from_plan(pooling, n) == strides


def test_the_suffixes_set_the_budget(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer("nnUNetTrainerLightMUNetT_40epochs_25iters")
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (40, 25, 5)
    assert trainer.save_every == 4
    trainer = make_trainer("nnUNetTrainerLightMUNetT")
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.save_every) == (1000, 250, 50)


def test_build_for_training_and_prediction_share_one_state_dict(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer()
    trainer.initialize()
    predictor = type(trainer).build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 2, enable_deep_supervision=False
    )
    predictor.load_state_dict(trainer.network.state_dict())
    x = random_batch(trainer)["data"]
    trainer.network.eval()
    predictor.eval()
    with torch.no_grad():
        first, second = trainer.network(x), predictor(x)
    assert torch.allclose(first, second, atol=1e-5)
    assert first.data_ptr() != trainer.network(x).data_ptr()  # a fresh tensor each time: nnU-Net adds into it


def test_switching_deep_supervision_on_leaves_a_network_without_it_alone(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer()
    trainer.initialize()
    trainer.set_deep_supervision_enabled(True)  # what nnU-Net does after each validation
    assert isinstance(trainer.network(random_batch(trainer)["data"]), torch.Tensor)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def test_the_bare_network_is_found_under_the_wrapper_of_compile(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer()
    trainer.initialize()
    network = trainer.network
    trainer.network = Wrapper(network)
    assert trainer.bare_network is network


def test_the_checkpoint_holds_all_that_nnunet_saves(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / "ours.pth"))
    theirs = io.BytesIO()
    nnUNetTrainer.save_checkpoint(trainer, theirs)  # type: ignore[arg-type]
    theirs.seek(0)
    ours = torch.load(tmp_path / "ours.pth", weights_only=False)
    expected = torch.load(theirs, weights_only=False)
    assert set(ours) - set(expected) == {"lightnets_rng"}
    assert set(expected) <= set(ours)
    for key in ("trainer_name", "current_epoch", "init_args", "inference_allowed_mirroring_axes"):
        assert ours[key] == expected[key]


def test_a_full_disk_keeps_the_previous_checkpoint(
    make_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    trainer.initialize()
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()

    class FullDisk(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 100_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(files, "open", FullDisk, raising=False)
    with pytest.raises(LightNetsError, match="No space left on device"):
        trainer.save_checkpoint(str(file))
    assert file.read_bytes() == before
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_killed_while_saving_the_previous_checkpoint_loads(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.initialize()
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()

    def killed(checkpoint: Any, stream: Any) -> None:
        stream.write(b"half a checkpoint")
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        torch.save = killed
        trainer.save_checkpoint(str(file))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert file.read_bytes() == before
    assert len(list(tmp_path.glob("*.partial"))) == 1
    trainer.save_checkpoint(str(file))  # the half one left behind is in nobody's way
    assert list(tmp_path.glob("*.partial")) == []
    make_trainer().load_checkpoint(str(file))


def test_a_truncated_checkpoint_is_named(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.initialize()
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(LightNetsError, match=r"checkpoint_latest\.pth cannot be read"):
        make_trainer().load_checkpoint(str(file))


@pytest.mark.slow
def test_a_resumed_training_equals_an_uninterrupted_one(
    make_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    whole = make_trainer()
    save = whole.save_checkpoint
    kept = tmp_path / "after_one_epoch.pth"

    def save_and_keep(filename: str) -> None:
        save(filename)
        if whole.current_epoch == 0:
            shutil.copy(filename, kept)

    monkeypatch.setattr(whole, "save_checkpoint", save_and_keep)
    whole.run_training()

    torch.manual_seed(7)  # other random numbers than the first run has now
    np.random.seed(7)  # noqa: NPY002
    resumed = make_trainer()
    resumed.load_checkpoint(str(kept))
    assert resumed.current_epoch == 1
    resumed.run_training()

    for (name, first), second in zip(
        whole.network.state_dict().items(), resumed.network.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name
    assert whole.optimizer.param_groups[0]["lr"] == resumed.optimizer.param_groups[0]["lr"]


class Scaler:
    """What GradScaler does where nothing overflows, on a CPU."""

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None: ...

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def update(self) -> None: ...


@pytest.mark.parametrize("scaled", [False, True])
def test_one_step_equals_nnunets_step(make_trainer: Callable[..., Any], scaled: bool) -> None:
    ours, theirs = make_trainer(), make_trainer()
    for trainer in (ours, theirs):
        torch.manual_seed(1)
        trainer.initialize()
        trainer.network.train()
        if scaled:
            trainer.grad_scaler = Scaler()
    batch = random_batch(ours)
    first = ours.train_step(dict(batch))
    second = nnUNetTrainer.train_step(theirs, dict(batch))
    assert first["loss"] == second["loss"]
    for a, b in zip(ours.network.parameters(), theirs.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("scaler", "steps"), [(None, 1), (Scaler(), MAX_SKIPPED_STEPS)])
def test_a_loss_that_is_not_finite_stops_the_training(
    make_trainer: Callable[..., Any], scaler: Scaler | None, steps: int
) -> None:
    trainer = make_trainer()
    trainer.initialize()
    trainer.grad_scaler = scaler
    batch = random_batch(trainer)
    batch["data"][:] = float("nan")
    for _ in range(steps - 1):
        trainer.train_step(batch)
    with pytest.raises(LightNetsError, match="in epoch 0"):
        trainer.train_step(batch)


class NoGradient(torch.autograd.Function):
    """The identity; its gradient is not a number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.full_like(grad, float("nan"))


@pytest.mark.parametrize(("scaled", "steps"), [(False, 1), (True, MAX_SKIPPED_STEPS)])
def test_gradients_that_are_not_finite_stop_the_training_and_leave_the_weights(
    make_trainer: Callable[..., Any], scaled: bool, steps: int
) -> None:
    """The loss is finite all the time; a gradient scaler would halve its scale for ever and skip each step."""
    trainer = make_trainer(configuration="2d", patch_size=[32, 32], batch_size=2)
    trainer.initialize()
    trainer.grad_scaler = torch.amp.GradScaler("cpu") if scaled else None
    loss = trainer.loss
    trainer.loss = lambda output, target: loss(NoGradient.apply(output), target)
    before = {key: tensor.clone() for key, tensor in trainer.network.state_dict().items()}
    batch = random_batch(trainer)
    for _ in range(steps - 1):
        assert np.isfinite(trainer.train_step(batch)["loss"])
    with pytest.raises(LightNetsError, match=r"the norm of its gradient is nan in epoch 0"):
        trainer.train_step(batch)
    assert all(torch.equal(tensor, before[key]) for key, tensor in trainer.network.state_dict().items())


def test_single_overflows_under_a_gradient_scaler_are_skipped(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(configuration="2d", patch_size=[32, 32], batch_size=2)
    trainer.initialize()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss, batch = trainer.loss, random_batch(trainer)
    weight = next(trainer.network.parameters())
    for step in range(2 * MAX_SKIPPED_STEPS):
        overflow = step % MAX_SKIPPED_STEPS != 3  # one good step among nineteen
        trainer.loss = lambda output, target, bad=overflow: loss(NoGradient.apply(output) if bad else output, target)
        before = weight.detach().clone()
        trainer.train_step(batch)
        assert torch.equal(weight, before) == overflow


@pytest.mark.parametrize("resumable", [False, True])
def test_going_on_is_offered_where_there_is_a_checkpoint(make_trainer: Callable[..., Any], resumable: bool) -> None:
    trainer = make_trainer(configuration="2d", patch_size=[32, 32], batch_size=2)
    trainer.initialize()
    if resumable:
        trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_best.pth")
    batch = random_batch(trainer)
    batch["data"][:] = float("nan")
    with pytest.raises(LightNetsError) as caught:
        trainer.train_step(batch)
    assert ("--c" in str(caught.value)) == resumable


@pytest.mark.parametrize("scaled", [False, True])
def test_nobody_waits_for_the_loss_before_all_is_queued(
    make_trainer: Callable[..., Any], scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU works on while Python queues; whatever looks at a value makes Python wait."""
    trainer = make_trainer(configuration="2d", patch_size=[32, 32], batch_size=2)
    trainer.initialize()
    trainer.grad_scaler = Scaler() if scaled else None
    order: list[str] = []
    step = trainer.optimizer.step
    backward, check = torch.Tensor.backward, torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: (order.append("backward"), backward(*a, **k))[1])
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: (order.append("look"), check(self))[1])
    monkeypatch.setattr(trainer.optimizer, "step", lambda *a, **k: (order.append("step"), step(*a, **k))[1])
    trainer.loss = lambda output, target: output.square().mean()
    trainer.train_step(random_batch(trainer))
    seen = [word for i, word in enumerate(order) if word not in order[:i]]
    assert order[-1] == ("look" if scaled else "step"), order
    assert seen == (["backward", "step", "look"] if scaled else ["backward", "look", "step"]), order


def test_an_unknown_configuration_is_refused_before_anything_is_written(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = find_trainer(TRAINER)
    plans = {"configurations": {"2d": {}}, "plans_name": "nnUNetPlans", "dataset_name": DATASET}
    with pytest.raises(LightNetsError, match="'3d_fullres' is not in the plans 'nnUNetPlans'"):
        trainer(plans, "3d_fullres", 0, {}, CPU)  # type: ignore[misc]
    assert list(tmp_path.iterdir()) == []
