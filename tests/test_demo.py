"""The demo: its data set splits honestly, and it can be interrupted and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_lightnets import demo
from nnunetv2_lightnets.errors import LightNetsError

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("nilearn")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / demo.DATASET
    assert demo.make_dataset(folder) == (18, 6)
    return folder


def _boxes(raw: Path, part: str) -> list[np.ndarray]:
    """First and last voxel centre of each block, in millimetres."""
    boxes = []
    for file in sorted((raw / f"images{part}").glob("*.nii.gz")):
        image = nibabel.load(file)
        corners = np.array([[0, 0, 0], np.array(image.shape) - 1])
        boxes.append(np.sort(nibabel.affines.apply_affine(image.affine, corners), axis=0))
    return boxes


def test_blocks_lie_in_one_hemisphere_and_do_not_overlap(raw: Path) -> None:
    train, test = _boxes(raw, "Tr"), _boxes(raw, "Ts")
    everything = train + test
    # The template is its own mirror image about x = 0.
    assert all(box[:, 0].min() >= 0 for box in everything)
    for i, a in enumerate(everything):
        for b in everything[:i]:
            assert (a[1] < b[0]).any() or (b[1] < a[0]).any()
    # The held-out blocks are a whole slab along the second axis.
    assert {tuple(box[:, 1]) for box in test}.isdisjoint(tuple(box[:, 1]) for box in train)


def test_images_and_labels_are_those_of_the_template(raw: Path) -> None:
    from nilearn import datasets

    template = datasets.load_mni152_template(resolution=1)
    intensities = template.get_fdata()
    brain = intensities[intensities > 0]
    for file in sorted((raw / "imagesTr").glob("*.nii.gz"))[::5]:
        image = nibabel.load(file)
        label = nibabel.load(raw / "labelsTr" / file.name.replace("_0000", ""))
        first = np.rint(np.linalg.inv(template.affine) @ image.affine[:, 3])[:3].astype(int)
        cut = tuple(slice(f, f + size) for f, size in zip(first, demo.BLOCK, strict=True))
        restored = image.get_fdata() * brain.std() + brain.mean()
        np.testing.assert_allclose(restored, intensities[cut], atol=1e-3)
        np.testing.assert_array_equal(label.affine, image.affine)
        values = label.get_fdata()
        assert set(np.unique(values)) <= {0, 1, 2}
        # In T1, white matter is brighter than grey matter, which is brighter than what is neither.
        means = [image.get_fdata()[values == value].mean() for value in (0, 1, 2) if (values == value).any()]
        assert means == sorted(means)


def test_nnunet_leaves_the_intensities_as_they_are(raw: Path) -> None:
    description = json.loads((raw / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "noNorm"}
    assert description["numTraining"] == 18


def test_the_default_trainer_does_not_augment(raw: Path) -> None:
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunetv2_lightnets.trainers import find_trainer

    trainer = find_trainer(demo.TRAINER)
    assert trainer is not None
    transforms = trainer.get_training_transforms((32, 32, 32), (0, 0), None, (0, 1, 2), False, foreground_labels=[1, 2])
    expected = nnUNetTrainer.get_validation_transforms(None, foreground_labels=[1, 2])
    assert isinstance(transforms, ComposeTransforms)
    assert [type(t) for t in transforms.transforms] == [type(t) for t in expected.transforms]


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LightNetsError, match=r"holds other files \(thesis.tex"):
        demo.Demo(tmp_path, demo.TRAINER, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("")
    with pytest.raises(LightNetsError, match="choose a folder that can be written"):
        demo.Demo(file / "folder", demo.TRAINER, "cpu")


def test_the_users_variables_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_results", "/of/the/user")
    monkeypatch.setenv("nnUNet_n_proc_DA", "5")
    run = demo.Demo(tmp_path / "new", demo.TRAINER, "cpu")
    assert run.environment["nnUNet_results"] == str(tmp_path / "new" / "nnUNet_results")
    assert run.environment["nnUNet_n_proc_DA"] == "5"
    assert dict(os.environ)["nnUNet_results"] == "/of/the/user"


@pytest.mark.slow
def test_a_command_that_fails_is_named_with_its_log(tmp_path: Path) -> None:
    run = demo.Demo(tmp_path, demo.TRAINER, "cpu")
    with pytest.raises(LightNetsError, match=r"nnUNetv2_train ended with exit code 2: .*the ID 990.*logs/train\.log"):
        run.command("train", ["nnUNetv2_train", "990", "2d", "0", "-tr", demo.TRAINER], done=tmp_path / "never")


def _demo(folder: Path) -> list[str]:
    trainer = "nnUNetTrainerLightMUNetDemo_3epochs_3iters"
    command = [sys.executable, "-m", "nnunetv2_lightnets.cli", "demo", "-o", str(folder), "-tr", trainer]
    return [*command, "-device", "cpu"]


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_interrupted_it_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "a new folder"
    with subprocess.Popen(_demo(folder), cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "Epoch 1" in line:
                process.send_signal(signal.SIGINT)
                break
        errors = process.stderr.read()
        assert process.wait(30) == 2, (said, errors)
        assert "go on" in errors, (said, errors)
    time.sleep(1)
    left = [p for p in Path("/proc").glob("[0-9]*/environ") if _reads(p, str(folder))]
    assert left == []

    done = subprocess.run(_demo(folder), cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "done before" in done.stdout  # the planning
    assert " --c\n" in done.stdout and "Epoch 2" in done.stdout and "Epoch 0" not in done.stdout
    assert "grey matter" in done.stdout and "white matter" in done.stdout
    assert "-tr nnUNetTrainerLightMUNet\n" in done.stdout
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")

    again = subprocess.run(_demo(folder), cwd="/", capture_output=True, text=True, check=False)
    assert again.returncode == 0 and again.stdout.count("done before") == 4


def _reads(file: Path, text: str) -> bool:
    try:
        return text.encode() in file.read_bytes()
    except OSError:
        return False
