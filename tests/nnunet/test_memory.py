"""The estimate of training memory: against counts by hand, and against memory that training steps take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_memory import ALLOCATOR

from nnunetv2_lightnets.nnunet import memory
from nnunetv2_lightnets.nnunet.memory import training_memory
from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.trainers import find_trainer

ROOT = Path(__file__).resolve().parents[2]


def test_parameters_and_state_are_counted_by_the_optimizer() -> None:
    trainer = find_trainer("nnUNetTrainerUltraLightUNetT")
    estimate = training_memory(trainer, patch_setting((32, 32), 1, 2), 2)
    network = trainer.build_network_architecture(*_managers(patch_setting((32, 32), 1, 2)), 1, 2, False)
    weights = 4 * sum(p.numel() for p in network.parameters())
    # AdamW keeps two moments of each weight; batch norm statistics and step counters are the rest.
    assert 3 * weights < estimate.fixed < 3.5 * weights


def test_bytes_of_a_known_graph() -> None:
    live = memory._LiveBytes()
    saved = memory._SavedBytes()
    with torch._subclasses.fake_tensor.FakeTensorMode(), live:
        x = torch.empty(1000, requires_grad=True)
        with saved:
            y = x.exp().exp()  # each keeps its result
        assert live.bytes == 3 * 4000
        assert saved.bytes == 2 * 4000
        y.sum().backward()
        assert live.peak >= 4 * 4000
        del x, y
    assert live.bytes == 0


def test_views_share_their_storage() -> None:
    with torch._subclasses.fake_tensor.FakeTensorMode(), memory._LiveBytes() as live:
        x = torch.empty(10, 10)
        views = [x.t(), x[2:], x.reshape(100)]
        assert live.bytes == 400 and len(views) == 3


def test_memory_grows_with_batch_and_patch_but_for_what_is_fixed() -> None:
    trainer = find_trainer("nnUNetTrainerULite")
    # With fewer than three patches, the peak is at another step: parameters outweigh so small feature maps.
    three, four, five = (training_memory(trainer, patch_setting((64, 64), 1, 2), n) for n in (3, 4, 5))
    assert three.fixed == five.fixed
    assert five.total - four.total == pytest.approx(four.total - three.total, rel=0.02)
    larger = training_memory(trainer, patch_setting((64, 128), 1, 2), 3)
    assert larger.saved == pytest.approx(2 * three.saved, rel=0.02)


def test_the_output_at_full_size_counts() -> None:
    trainer = find_trainer("nnUNetTrainerUltraLightUNetT")
    few, many = (training_memory(trainer, patch_setting((64, 64), 1, classes), 2).step for classes in (2, 22))
    # Logits, softmax, one-hot labels and their gradients: several times 20 more channels at full size.
    assert many - few > 3 * 20 * 2 * 64 * 64 * 4


def test_ignored_and_overlapping_labels_are_counted() -> None:
    trainer = find_trainer("nnUNetTrainerUltraLightUNetT")
    setting = patch_setting((32, 32), 1, 3)
    plain = training_memory(trainer, setting, 2).step
    setting.dataset_json["labels"]["ignore"] = 3
    assert training_memory(trainer, setting, 2).step > plain
    setting.dataset_json["labels"] = {"background": 0, "whole": [1, 2], "core": [2]}
    setting.dataset_json["regions_class_order"] = [1, 2]
    assert training_memory(trainer, setting, 2).step > 0


def test_nothing_of_the_users_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.delenv("nnUNet_raw", raising=False)
    training_memory(find_trainer("nnUNetTrainerUltraLightUNetT"), patch_setting((32, 32), 1, 2), 2)
    assert not list(tmp_path.iterdir())
    assert os.environ["nnUNet_results"] == str(tmp_path) and "nnUNet_raw" not in os.environ  # noqa: SIM112


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peaks of memory")
@pytest.mark.parametrize(
    "trainer, patch, batch",
    [
        pytest.param("nnUNetTrainerULite", "[256, 256]", "4", marks=pytest.mark.slow),
        pytest.param("nnUNetTrainerUltraLightUNet", "[48, 64, 64]", "2", marks=pytest.mark.slow),
        pytest.param("nnUNetTrainerLightMUNetS", "[40, 56, 40]", "2", marks=pytest.mark.slow),
        pytest.param("nnUNetTrainerSwinUMambaDScratch", "[256, 256]", "2", marks=pytest.mark.slow),
    ],
)
def test_estimate_is_what_training_takes(trainer: str, patch: str, batch: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "training_memory.py"), "--case", trainer, patch, batch]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | ALLOCATOR)
    row = json.loads(done.stdout.splitlines()[-1])
    assert 0.8 < row["estimated_over_measured"] < 1.2, row


def _managers(setting: object) -> tuple[object, object]:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(setting.plans)
    return plans, plans.get_configuration(setting.configuration)
