"""The recipe of Swin-UMamba: optimizer, schedule, supervision, ImageNet weights and the frozen encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from nnunet_commands import DATASET, NNUNet
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import CACHE_VARIABLE
from nnunetv2_lightnets.nnunet.schedules import CosineSchedule
from nnunetv2_lightnets.pretrained.cache import VMAMBA_FILE
from nnunetv2_lightnets.pretrained.vmamba import vmamba_tiny_shapes
from nnunetv2_lightnets.trainers import swin_umamba as recipes

SMALL = {
    "nnUNetTrainerSwinUMamba": {"features": (4, 8, 16, 32, 64), "depths": (1, 1, 1, 1), "d_state": 4},
    "nnUNetTrainerSwinUMambaD": {"features": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "d_state": 4},
}
PRETRAINED = list(SMALL)
SCRATCH = [f"{name}Scratch" for name in SMALL]
FROZEN_EPOCHS = 10


@pytest.fixture
def make_trainer(nnunet: NNUNet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Maker of trainers with small networks on real plans; the cache of weights is empty."""
    for key, value in nnunet.environment.items():
        if key.startswith("nnUNet_"):
            monkeypatch.setenv(key, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))

    def make(name: str, configuration: str = "2d", full_size: bool = False, **plan_changes: Any) -> Any:
        folder = nnunet.preprocessed / DATASET
        plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
        plans["configurations"]["2d"].update({"batch_size": 2, "patch_size": [32, 40]} | plan_changes)
        description = json.loads((folder / "dataset.json").read_text())
        base = getattr(recipes, name)
        settings = {} if full_size else {"network_kwargs": SMALL[name.removesuffix("Scratch")]}
        return type(name, (base,), settings)(plans, configuration, 0, description, torch.device("cpu"))

    return make


def random_batch(trainer: Any) -> dict[str, Any]:
    shape = (trainer.batch_size, 1, *trainer.configuration_manager.patch_size)
    seg = torch.randint(0, 2, shape).float()
    downsample = DownsampleSegForDSTransform(trainer._get_deep_supervision_scales())
    targets = [downsample(segmentation=s)["segmentation"] for s in seg]
    return {"data": torch.randn(shape), "target": [torch.stack(level) for level in zip(*targets, strict=True)]}


def values(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def moved(before: dict[str, Tensor], network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("name", PRETRAINED + SCRATCH)
def test_the_optimizer_is_the_published_one(name: str, make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(name)
    trainer.initialize()
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    (group,) = trainer.optimizer.param_groups
    assert {key: group[key] for key in ("lr", "weight_decay", "eps", "betas")} == {
        "lr": 1e-4,
        "weight_decay": 0.05,
        "eps": 1e-5,
        "betas": (0.9, 0.999),
    }
    assert len(group["params"]) == len(list(trainer.network.parameters()))
    assert trainer.num_epochs == 1000


def test_the_learning_rate_is_the_published_cosine() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], 1e-4)
    schedule = CosineSchedule(optimizer, 1000, final_lr=1e-6)
    published = {0: 1e-4, 99: 9.76e-5, 249: 8.56e-5, 349: 7.31e-5, 1000: 1e-6}
    for epoch, lr in published.items():
        schedule.step(epoch)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-3)
        assert schedule.get_last_lr() == [optimizer.param_groups[0]["lr"]]
    theirs = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], 1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 1000, eta_min=1e-6)
    ours = CosineSchedule(optimizer, 1000, final_lr=1e-6)
    for _ in range(20):
        ours.step()
        cosine.step()
        assert ours.get_last_lr() == pytest.approx(cosine.get_last_lr(), rel=1e-9)


def test_a_resumed_schedule_goes_on_with_the_same_values() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], 1e-4)
    schedule = CosineSchedule(optimizer, 100, final_lr=1e-6)
    schedule.step(41)
    resumed = torch.optim.AdamW([parameter], 1e-4)
    after = CosineSchedule(resumed, 100, final_lr=1e-6)
    resumed.load_state_dict(optimizer.state_dict())  # nnU-Net saves no scheduler
    after.step(42)
    schedule.step(42)
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("nnUNetTrainerSwinUMamba", [1, 1 / 2, 1 / 4, 1 / 8]),
        ("nnUNetTrainerSwinUMambaD", [1, 1 / 4, 1 / 8, 1 / 16]),
        ("nnUNetTrainerSwinUMambaScratch", [1, 1 / 2, 1 / 4, 1 / 8]),
        ("nnUNetTrainerSwinUMambaDScratch", [1, 1 / 4, 1 / 8, 1 / 16]),
    ],
)
def test_supervision_is_at_the_published_scales_and_weights(
    name: str, scales: list[float], make_trainer: Callable[..., Any]
) -> None:
    trainer = make_trainer(name)
    trainer.initialize()
    assert trainer._get_deep_supervision_scales() == [[scale, scale] for scale in scales]
    assert list(trainer.loss.weight_factors) == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])


@pytest.mark.parametrize("name", PRETRAINED)
@pytest.mark.parametrize("patch_size", [[32, 40], [33, 47], [8, 12], [66, 20]])
def test_targets_fit_the_outputs_at_any_patch_size(
    name: str, patch_size: list[int], make_trainer: Callable[..., Any]
) -> None:
    trainer = make_trainer(name, patch_size=patch_size)
    trainer.initialize()
    batch = random_batch(trainer)
    outputs = trainer.network(batch["data"])
    assert [output.shape[2:] for output in outputs] == [target.shape[2:] for target in batch["target"]]
    assert torch.isfinite(trainer.loss(outputs, batch["target"]))


@pytest.mark.parametrize("name", PRETRAINED + SCRATCH)
def test_the_encoder_is_frozen_for_ten_epochs_if_it_is_pretrained(name: str, make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(name)
    trainer.initialize()
    network, batch = trainer.network, random_batch(trainer)
    network.train()
    pretrained = set(network.frozen_parameters())
    # The coarsest head has weight 0 in the loss, and AdamW passes over what has no gradient.
    ever_trained = {key for key, _ in network.named_parameters() if "seg_layers" not in key} - pretrained
    for epoch in (0, FROZEN_EPOCHS - 1, FROZEN_EPOCHS):
        trainer.current_epoch = epoch
        before = values(network)
        trainer.train_step(batch)
        now = moved(before, network)
        assert ever_trained <= now
        frozen = name in PRETRAINED and epoch < FROZEN_EPOCHS
        assert now & pretrained == (set() if frozen else pretrained)
        assert len(trainer.frozen_parameters()) == (len(pretrained) if frozen else 0)
        states = set(trainer.optimizer.state)
        assert frozen == states.isdisjoint(network.get_parameter(key) for key in pretrained)


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_pretrained_trainer_without_weights_stops_with_the_remedy(
    name: str, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(name)
    monkeypatch.setattr(type(trainer), "get_dataloaders", lambda self: pytest.fail("training went on"))
    with pytest.raises(LightNetsError, match=r"there are no ImageNet weights at .*nnUNetv2_lightnets weights"):
        trainer.run_training()
    assert trainer.current_epoch == 0


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Networks for which ImageNet weights were loaded; nnU-Net's own start of a training is left out."""
    loaded: list[nn.Module] = []

    def load(network: nn.Module, path: Path) -> str:
        loaded.append(network)
        return "ImageNet weights of VMamba"

    monkeypatch.setattr(recipes, "load_vmamba", load)
    monkeypatch.setattr("nnunetv2_lightnets.nnunet.trainer.LightNetsTrainer.on_train_start", lambda self: None)
    return loaded


@pytest.mark.parametrize("name", PRETRAINED + SCRATCH)
def test_a_fresh_training_starts_from_imagenet(
    name: str, make_trainer: Callable[..., Any], started: list[nn.Module]
) -> None:
    trainer = make_trainer(name)
    trainer.on_train_start()
    assert started == ([trainer.network] if name in PRETRAINED else [])
    (log,) = Path(trainer.output_folder).glob("training_log_*.txt")
    assert ("ImageNet weights" in log.read_text()) == (name in PRETRAINED)
    assert ("frozen" in log.read_text()) == (name in PRETRAINED)


def test_a_resumed_training_needs_no_imagenet_weights(
    make_trainer: Callable[..., Any], started: list[nn.Module]
) -> None:
    trainer = make_trainer("nnUNetTrainerSwinUMambaD")
    trainer.initialize()
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    resumed = make_trainer("nnUNetTrainerSwinUMambaD")
    resumed.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    resumed.on_train_start()
    assert started == []
    assert resumed.current_epoch == 1
    assert moved(values(trainer.network), resumed.network) == set()


def test_weights_that_the_user_gives_are_not_overwritten(
    make_trainer: Callable[..., Any], started: list[nn.Module]
) -> None:
    file = str(Path(make_trainer("nnUNetTrainerSwinUMambaD").output_folder) / "other.pth")
    given = make_trainer("nnUNetTrainerSwinUMambaD")
    given.initialize()
    given.save_checkpoint(file)
    trainer = make_trainer("nnUNetTrainerSwinUMambaD")
    trainer.initialize()
    load_pretrained_weights(trainer.network, file)  # what -pretrained_weights does
    trainer.on_train_start()
    assert started == []


@pytest.mark.parametrize("name", PRETRAINED)
def test_training_at_full_size_starts_from_the_file_in_the_cache(
    name: str, make_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {key: torch.full(shape, 0.5) for key, shape in vmamba_tiny_shapes().items()}
    (tmp_path / "cache").mkdir()
    save_file(state, tmp_path / "cache" / VMAMBA_FILE)
    monkeypatch.setattr("nnunetv2_lightnets.nnunet.trainer.LightNetsTrainer.on_train_start", lambda self: None)
    trainer = make_trainer(name, full_size=True)
    trainer.on_train_start()
    for key in trainer.network.vmamba_keys().values():
        if key != "vssm_encoder.patch_embed.proj.weight":  # adapted to one channel
            assert (trainer.network.get_parameter(key) == 0.5).all()
    (log,) = Path(trainer.output_folder).glob("training_log_*.txt")
    assert f"loaded from {tmp_path / 'cache' / VMAMBA_FILE} (SHA-256 " in log.read_text()
    assert "of the encoder" in log.read_text()


@pytest.mark.parametrize("name", PRETRAINED + SCRATCH)
def test_volumes_are_refused_before_anything_is_written(
    name: str, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    refusal = r"cannot train 3d_fullres: swin_umamba(_d)? does not exist in 3D.*: nnUNetTrainerLightMUNet, "
    with pytest.raises(LightNetsError, match=refusal):
        make_trainer(name, configuration="3d_fullres")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINED)
def test_resumed_at_any_epoch_around_the_switch_it_ends_the_same(
    name: str, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(recipes, "vmamba_path", lambda: "nowhere")
    monkeypatch.setattr(recipes, "load_vmamba", lambda network, path: "random weights in place of ImageNet's")

    def made(folder: str) -> Any:
        monkeypatch.setenv("nnUNet_results", str(tmp_path / folder))
        trainer = make_trainer(name)
        trainer.num_epochs, trainer.save_every = FROZEN_EPOCHS + 2, 1
        trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
        trainer.perform_actual_validation = lambda save_probabilities=False: None
        return trainer

    whole = made("whole")
    states: list[dict[str, Tensor]] = []
    save = whole.save_checkpoint

    def save_and_keep(filename: str) -> None:
        save(filename)
        if filename.endswith("checkpoint_latest.pth"):
            shutil.copy(filename, tmp_path / f"after_{whole.current_epoch + 1}.pth")
            states.append({key: value.clone() for key, value in whole.network.state_dict().items()})

    whole.save_checkpoint = save_and_keep
    whole.run_training()
    states.append(whole.network.state_dict())
    assert len(states) == FROZEN_EPOCHS + 2
    frozen = set(whole.network.frozen_parameters())
    for epoch in range(1, len(states)):
        moved = {
            n
            for n in dict(whole.network.named_parameters())
            if not torch.equal(*(s[n] for s in states[epoch - 1 : epoch + 1]))
        }
        assert bool(moved & frozen) == (epoch >= FROZEN_EPOCHS), epoch
        assert moved - frozen, epoch

    for done in (FROZEN_EPOCHS - 1, FROZEN_EPOCHS, FROZEN_EPOCHS + 1):
        torch.manual_seed(done)  # other random numbers than the first run has now
        resumed = made(f"resumed after {done}")
        resumed.load_checkpoint(str(tmp_path / f"after_{done}.pth"))
        assert resumed.current_epoch == done
        resumed.run_training()
        for key, tensor in whole.network.state_dict().items():
            assert torch.equal(tensor, resumed.network.state_dict()[key]), (done, key)
