"""What a user does, with nnU-Net's real commands on real MRI: train, resume, predict, evaluate, export, import.

The tests of this file run in order and build on each other's folders, as a user's commands do.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from nnunet_commands import DATASET, ID, NNUNet

TRAINER = "nnUNetTrainerLightMUNetT_2epochs_5iters"


@pytest.fixture(scope="module", params=[pytest.param(c, marks=pytest.mark.slow) for c in ("3d_fullres", "2d")])
def trained(request: pytest.FixtureRequest, nnunet: NNUNet) -> tuple[NNUNet, str]:
    configuration = request.param
    nnunet.must("nnUNetv2_train", str(ID), configuration, "0", "-tr", TRAINER, "-device", "cpu")
    return nnunet, configuration


def test_training_leaves_what_nnunet_leaves(trained: tuple[NNUNet, str]) -> None:
    nnunet, configuration = trained
    fold = nnunet.model(TRAINER, configuration) / "fold_0"
    for file in (
        "checkpoint_final.pth",
        "checkpoint_best.pth",
        "progress.png",
        "debug.json",
        "validation/summary.json",
    ):
        assert (fold / file).is_file(), file
    assert not list(fold.glob("*.partial"))
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == TRAINER
    assert checkpoint["current_epoch"] == 2
    log = next(fold.glob("training_log_*.txt")).read_text()
    assert "nnunetv2_lightnets" in log
    assert "lightm_unet" in log
    assert "selective scan on cpu: backend" in log
    assert "could not be estimated" not in log


def predict(nnunet: NNUNet, images: Path, configuration: str, out: Path) -> None:
    model = ("-d", str(ID), "-c", configuration, "-f", "0", "-tr", TRAINER, "-device", "cpu", "-npp", "1", "-nps", "1")
    nnunet.must("nnUNetv2_predict", "-i", str(images), "-o", str(out), *model)


@pytest.fixture(scope="module")
def predicted(trained: tuple[NNUNet, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictions of the trained model, by a new process."""
    nnunet, configuration = trained
    out = tmp_path_factory.mktemp("predictions")
    predict(nnunet, nnunet.raw / DATASET / "imagesTs", configuration, out)
    return out


def test_a_new_process_predicts_and_nnunet_evaluates(trained: tuple[NNUNet, str], predicted: Path) -> None:
    nnunet, _ = trained
    files = ("-djfile", str(predicted / "dataset.json"), "-pfile", str(predicted / "plans.json"))
    nnunet.must("nnUNetv2_evaluate_folder", str(nnunet.raw / DATASET / "labelsTs"), str(predicted), *files)
    summary = json.loads((predicted / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1


@pytest.mark.slow
def test_a_killed_training_goes_on(trained: tuple[NNUNet, str]) -> None:
    nnunet, configuration = trained
    trainer = "nnUNetTrainerLightMUNetT_3epochs_5iters"
    fold = nnunet.model(trainer, configuration) / "fold_0"
    train = (str(ID), configuration, "0", "-tr", trainer, "-device", "cpu")
    with nnunet.start("nnUNetv2_train", *train) as process:
        for line in process.stdout:
            if "Epoch 1" in line:  # the checkpoint of the first epoch is on disk
                os.killpg(process.pid, signal.SIGKILL)
                break
    assert (fold / "checkpoint_latest.pth").is_file()
    assert not (fold / "checkpoint_final.pth").exists()
    done = nnunet.must("nnUNetv2_train", *train, "--c")
    assert "Epoch 0" not in done.stdout
    assert "Epoch 1" in done.stdout and "Epoch 2" in done.stdout
    logged = torch.load(fold / "checkpoint_final.pth", weights_only=False)["logging"]
    assert len(logged["train_losses"]) == 3


@pytest.mark.slow
def test_a_model_travels_as_a_zip_into_a_fresh_environment(
    trained: tuple[NNUNet, str], predicted: Path, fresh_python: Path, tmp_path: Path
) -> None:
    nnunet, configuration = trained
    model = ("-d", str(ID), "-c", configuration, "-f", "0", "-tr", TRAINER)
    archive = tmp_path / "model.zip"
    nnunet.must("nnUNetv2_export_model_to_zip", *model, "-o", str(archive))
    other = NNUNet(tmp_path / "elsewhere", fresh_python)
    other.must("nnUNetv2_install_pretrained_model_from_zip", str(archive))
    predict(other, nnunet.raw / DATASET / "imagesTs", configuration, tmp_path / "there")
    found = sorted(predicted.glob("*.nii.gz"))
    assert len(found) == 2
    for here in found:
        assert here.read_bytes() == (tmp_path / "there" / here.name).read_bytes()


@pytest.mark.slow
def test_pretrained_weights_of_another_class_count(nnunet: NNUNet, trained: tuple[NNUNet, str], tmp_path: Path) -> None:
    _, configuration = trained
    checkpoint = nnunet.model(TRAINER, configuration) / "fold_0" / "checkpoint_final.pth"
    three = NNUNet(tmp_path)
    shutil.copytree(nnunet.preprocessed, three.preprocessed, dirs_exist_ok=True)
    file = three.preprocessed / DATASET / "dataset.json"
    description = json.loads(file.read_text())
    description["labels"]["something else"] = 2
    file.write_text(json.dumps(description))
    trainer = "nnUNetTrainerLightMUNetT_1epochs_1iters"
    train = (str(ID), configuration, "0", "-tr", trainer, "-device", "cpu", "-pretrained_weights", str(checkpoint))
    three.must("nnUNetv2_train", *train)
    before = torch.load(checkpoint, weights_only=False)["network_weights"]
    after = torch.load(three.model(trainer, configuration) / "fold_0" / "checkpoint_final.pth", weights_only=False)[
        "network_weights"
    ]
    assert before.keys() == after.keys()
    heads = {key for key in before if before[key].shape != after[key].shape}
    assert heads and all(after[key].shape[0] == 3 for key in heads)
    for key in before.keys() - heads:  # one step of Adam moves a weight by its learning rate, 1e-4, at most
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1.1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["999", "3d_fullres", "0", "-tr", TRAINER], "dataset with the ID 999", marks=pytest.mark.slow),
        pytest.param(
            [str(ID), "3d_lowres", "0", "-tr", TRAINER], "'3d_lowres' is not in the plans", marks=pytest.mark.slow
        ),
        ([str(ID), "3d_fullres", "0", "-tr", "nnUNetTrainerLightMUnet"], "did you mean nnUNetTrainerLightMUNet"),
        pytest.param(
            [str(ID), "3d_fullres", "0", "-tr", TRAINER, "-p", "nnUNetNoPlans"],
            "nnUNetNoPlans.json does not exist",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_mistakes_get_one_line_and_code_2(nnunet: NNUNet, arguments: list[str], words: str) -> None:
    done = nnunet.run("nnUNetv2_train", *arguments, "-device", "cpu")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_results_folder_that_cannot_be_written(nnunet: NNUNet, tmp_path: Path) -> None:
    (file := tmp_path / "not a folder").write_text("")
    train = (str(ID), "3d_fullres", "0", "-tr", TRAINER, "-device", "cpu")
    done = nnunet.run("nnUNetv2_train", *train, nnUNet_results=str(file / "results"))
    assert done.returncode == 2, done.stderr
    assert str(file) in done.stderr
    assert "Traceback" not in done.stderr
