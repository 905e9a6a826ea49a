"""nnU-Net's own search finds our trainers, one class for each name."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest

from nnunetv2_lightnets.discovery.environment import SHIM_FOLDER, VARIABLE
from nnunetv2_lightnets.discovery.lookup import trainer_or_attribute_error
from nnunetv2_lightnets.nnunet.trainer_names import TRAINERS, nearest_trainers
from nnunetv2_lightnets.trainers import find_trainer


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, SHIM_FOLDER)
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    return recursive_find_trainer_class_by_name


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_is_found_by_nnunet(search, name: str) -> None:
    trainer = search(name)
    assert trainer.__name__ == name


@pytest.mark.parametrize("name", ["nnUNetTrainerLightMUNet", "nnUNetTrainerLightMUNetT_2epochs_10iters"])
def test_a_trainer_is_one_class_and_can_be_pickled(search, name: str) -> None:
    trainer = search(name)
    assert search(name) is trainer
    assert pickle.loads(pickle.dumps(trainer)) is trainer
    assert issubclass(trainer, find_trainer("nnUNetTrainerLightMUNetT" if "_" in name else name))


def test_a_folder_with_spaces_and_another_plugin(search, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "another plugin"
    other.mkdir()
    (other / "theirs.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerTheirs(nnUNetTrainer): pass\n"
    )
    monkeypatch.setenv(VARIABLE, os.pathsep.join([str(other), SHIM_FOLDER]))
    assert search("nnUNetTrainerTheirs").__module__ == "theirs"
    assert search("nnUNetTrainerLightMUNet") is find_trainer("nnUNetTrainerLightMUNet")


def test_a_broken_module_of_the_user_is_not_hidden(search, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('my own mistake')")
    monkeypatch.setenv(VARIABLE, os.pathsep.join([str(tmp_path), SHIM_FOLDER]))
    with pytest.raises(RuntimeError, match="my own mistake"):
        search("nnUNetTrainerLightMUNet")


def test_a_missing_folder_of_the_user_is_named_once(
    search, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    missing = str(tmp_path / "missing")
    monkeypatch.setenv(VARIABLE, os.pathsep.join([missing, SHIM_FOLDER]))
    assert search("nnUNetTrainerLightMUNet")
    assert capsys.readouterr().err.count(f"does not exist: {missing}\n") == 1


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [
        ("nnUNetTrainerLightMUnet", "nnUNetTrainerLightMUNet"),
        ("nnUNetTrainerLigthMUNet_50epochs", "nnUNetTrainerLightMUNet_50epochs"),
        ("nnUNetTrainerLightMUNet_50epoch", "nnUNetTrainerLightMUNet"),
        ("nnUNetTrainerLightUNet_2epochs_5iters", "nnUNetTrainerLightMUNet_2epochs_5iters"),
    ],
)
def test_a_misspelt_name_lists_the_nearest(misspelt: str, nearest: str) -> None:
    assert find_trainer(misspelt) is None
    assert nearest_trainers(misspelt)[0] == nearest


@pytest.mark.parametrize("name", ["nnUNetTrainerXYZ", "nnUNetTrainerDiceCELoss_noSmooth"])
def test_names_that_resemble_none_of_ours_are_left_to_nnunet(name: str) -> None:
    assert nearest_trainers(name) == []
    with pytest.raises(AttributeError):
        trainer_or_attribute_error(name)


@pytest.mark.parametrize("name", ["nnUNetTrainerLightMUNet_0epochs", "nnUNetTrainerLightMUNet_2epochs_3epochs"])
def test_senseless_budgets_are_no_trainers(name: str) -> None:
    assert find_trainer(name) is None


@pytest.mark.parametrize("name", ["re", "Any", "importlib", "find_trainer", "__name__", "lightm_unet", "TRAINERS"])
def test_what_is_no_trainer_is_not_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "1", "2d", "0", "-tr", name])
    assert find_trainer(name) is None
    with pytest.raises(AttributeError):
        trainer_or_attribute_error(name)
