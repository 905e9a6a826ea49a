"""Plans for our networks: patches that fit, memory kept, nnU-Net's rules followed, mistakes refused in one line."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_lightnets.cli import main
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks.padding import total_stride
from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.plans.planner import GIGABYTE, Planner, plans_name, with_kept_configurations
from nnunetv2_lightnets.plans.reference import SETTINGS, reference_names, reference_setting
from nnunetv2_lightnets.trainers import find_trainer

TINY = "nnUNetTrainerUltraLightUNetT"


def base_plans(patch: tuple[int, ...], median: tuple[int, ...], cases: int = 10) -> tuple[dict, dict]:
    """nnU-Net's plans with one configuration, ``2d`` or ``3d_fullres``."""
    setting = patch_setting(patch, 1, 3)
    (entry,) = setting.plans["configurations"].values()
    entry["median_image_size_in_voxels"] = list(median)
    setting.plans["original_median_shape_after_transp"] = [1] * (3 - len(median)) + list(median)
    setting.plans["configurations"] = {"2d" if len(patch) == 2 else "3d_fullres": entry}
    return setting.plans, setting.dataset_json | {"numTraining": cases}


def planner(trainer: str, plans: dict, dataset_json: dict, memory: float | None = None, **fixed: Any) -> Planner:
    return Planner(find_trainer(trainer), plans, dataset_json, "new", memory, **fixed)


@pytest.mark.slow
def test_patch_is_the_image_rounded_up_to_the_strides_and_the_batch_five_percent() -> None:
    made = planner(TINY, *base_plans((64, 64), (60, 90), cases=100))
    (planned,) = made.plan(["2d"])
    architecture = made.plans["configurations"]["2d"]["architecture"]
    stride = total_stride(architecture["arch_kwargs"]["network_strides"])
    assert all(side % s == 0 and 0 <= side - m < s for side, s, m in zip(planned.patch, stride, (60, 90), strict=True))
    assert planned.batch_size == round(60 * 90 * 100 * 0.05 / math.prod(planned.patch))
    assert made.plans["configurations"]["2d"]["data_identifier"] == "free"


@pytest.mark.slow
def test_little_memory_makes_smaller_patches_and_what_is_planned_fits() -> None:
    plans, dataset_json = base_plans((128, 128), (256, 192))
    limit = 0.02
    made = planner(TINY, plans, dataset_json, limit)
    (planned,) = made.plan(["2d"])
    assert planned.memory <= limit * GIGABYTE and planned.batch_size >= 2
    assert math.prod(planned.patch) < 256 * 192
    assert plans["configurations"]["2d"]["patch_size"] == [128, 128], "the base plans are left alone"


@pytest.mark.parametrize("limit", [119, 120, 250, 399, 400, 401, 10_000])
def test_the_batch_is_the_largest_that_fits_and_is_found_in_few_steps(limit: int) -> None:
    made = planner(TINY, *base_plans((16, 16), (64, 64), cases=1000))
    asked: list[int] = []

    def memory(name: str, batch_size: int) -> int:  # grows faster from 20 patches on
        asked.append(batch_size)
        return 100 + 10 * batch_size + 15 * max(0, batch_size - 20)

    made._memory = memory  # type: ignore[method-assign]
    batch_size, needed = made._largest_batch("2d", "2d", memory("2d", 2), limit)
    most = round(64 * 64 * 1000 * 0.05 / 16**2)
    largest = max(n for n in range(2, most + 1) if n == 2 or memory("2d", n) <= limit)
    assert batch_size == largest
    assert needed == memory("2d", largest)
    assert len(asked) - (most - 2) < 12


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(LightNetsError, match=r"0.0003 GB are too little for nnUNetTrainerUltraLightUNetT in 2d"):
        planner(TINY, *base_plans((64, 64), (64, 64)), 0.0003).plan(["2d"])


def test_fixed_settings_are_taken_as_they_are() -> None:
    made = planner(TINY, *base_plans((64, 64), (64, 64)), patch={2: (48, 40)}, batch_size={2: 3})
    (planned,) = made.plan(["2d"])
    assert (planned.patch, planned.batch_size) == ((48, 40), 3)


@pytest.mark.slow
def test_cascade_inherits_and_keeps_its_previous_stage() -> None:
    plans, dataset_json = base_plans((32, 32, 32), (32, 32, 32))
    plans["configurations"]["3d_lowres"] = copy.deepcopy(plans["configurations"]["3d_fullres"])
    plans["configurations"]["3d_lowres"]["next_stage"] = "3d_cascade_fullres"
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plans["configurations"]["3d_cascade_fullres"] = cascade | {"batch_size": 99}
    made = planner(TINY, plans, dataset_json)
    planned = {p.configuration: p for p in made.plan(["3d_cascade_fullres"])}
    assert set(planned) == {"3d_lowres", "3d_fullres", "3d_cascade_fullres"}
    assert made.plans["configurations"]["3d_cascade_fullres"] == cascade
    assert planned["3d_cascade_fullres"].batch_size == planned["3d_fullres"].batch_size
    assert planned["3d_cascade_fullres"].memory > planned["3d_fullres"].memory, "it has more input channels"


def test_a_gpu_trains_in_half_precision() -> None:
    """Which the estimate knows, without a GPU."""
    plans = base_plans((128, 128), (128, 128))
    full, mixed = (planner("nnUNetTrainerULite", *plans, device=device).plan(["2d"])[0] for device in ("cpu", "cuda"))
    assert mixed.patch == full.patch and mixed.batch_size == full.batch_size
    assert 0.4 < mixed.memory / full.memory < 0.9


def test_swin_umamba_refuses_volumes() -> None:
    with pytest.raises(LightNetsError, match="swin_umamba does not exist in 3D"):
        planner("nnUNetTrainerSwinUMamba", *base_plans((32, 32, 32), (32, 32, 32))).plan(["3d_fullres"])


def test_names() -> None:
    assert plans_name(find_trainer("nnUNetTrainerLightMUNet")) == "nnUNetPlans_lightm_unet"
    assert plans_name(find_trainer("nnUNetTrainerLightMUNetS_5epochs"), "mine") == "nnUNetPlans_lightm_unet_S_mine"
    assert plans_name(find_trainer("nnUNetTrainerSwinUMambaDScratch")) == "nnUNetPlans_swin_umamba_d"


def test_other_configurations_of_an_older_file_are_kept() -> None:
    kept = with_kept_configurations({"configurations": {"2d": 1}}, {"configurations": {"2d": 0, "own": 2}})
    assert kept == {"configurations": {"2d": 1, "own": 2}}


@pytest.mark.parametrize("trainer", [TINY, "nnUNetTrainerULite", "nnUNetTrainerLightMUNetT"])
def test_stock_trainer_gets_the_one_output_with_all_the_weight(trainer: str) -> None:
    made = planner(trainer, *base_plans((32, 32), (32, 32)))
    made.plan(["2d"])
    configuration = PlansManager(made.plans).get_configuration("2d")
    arguments = (
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
    )
    supervised = get_network_from_plans(*arguments, 1, 3, deep_supervision=True).eval()
    ours = find_trainer(trainer).build_network_architecture(None, configuration, 1, 3, False)
    supervised.load_state_dict(ours.state_dict())  # the same names: weights go from one trainer to the other
    x = torch.randn(2, 1, 32, 32)
    fine, coarse = supervised(x)
    torch.testing.assert_close(fine, ours(x), rtol=1e-4, atol=1e-4)
    assert coarse.shape == (2, 3, 16, 16)
    supervised.decoder.deep_supervision = False
    torch.testing.assert_close(supervised(x), fine)


def test_deep_supervision_scales_are_what_nnunet_reads_from_the_plans() -> None:
    from nnunetv2_lightnets.nnunet.planned_networks import output_strides

    for scales in ((1.0, 0.5), (1.0, 0.5, 0.25, 0.125), (1.0, 0.25, 0.125, 0.0625)):
        product, read = 1, []
        for stride in output_strides(scales, 2):
            product *= stride[0]
            read.append(1 / product)
        assert tuple(read[:-1]) == scales


def test_reference_settings_are_whole() -> None:
    for name in reference_names():
        reference = reference_setting(name)
        assert set(reference.settings) == set(SETTINGS)
        assert all(entry["source"] and "value" in entry for entry in reference.settings.values())
        assert find_trainer(reference.trainer) is not None
        patch = reference.settings["patch"]["value"]
        assert patch is None or len(patch) == reference.dims
    assert reference_setting("lits").settings["patch"]["value"] == [128, 128, 128]
    with pytest.raises(LightNetsError, match="did you mean lits"):
        reference_setting("litz")


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A planned data set, 901, as nnU-Net leaves it; not preprocessed."""
    folder = tmp_path / "Dataset901_Small"
    folder.mkdir()
    plans, dataset_json = base_plans((64, 64), (64, 64))
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans | {"dataset_name": folder.name}))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    (folder / "dataset_fingerprint.json").write_text("{}")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    return folder


def test_command_writes_plans_and_says_what_comes_next(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-d", "901", "-tr", TINY]) == 0
    said = capsys.readouterr().out
    plans = json.loads((dataset / "nnUNetPlans_ultralight_unet_T.json").read_text())
    assert plans["plans_name"] == "nnUNetPlans_ultralight_unet_T"
    assert "nnUNetv2_preprocess -d 901 -plans_name nnUNetPlans_ultralight_unet_T -c 2d" in said
    assert "for a training step in float32" in said
    (dataset / "free").mkdir()
    for case in range(10):
        (dataset / "free" / f"{case}.pkl").touch()
    assert main(["plan", "-d", "901", "-tr", TINY, "-device", "cuda"]) == 0
    said = capsys.readouterr().out
    assert "for a training step in mixed precision on a GPU" in said
    assert "are overwritten" in said and "Do not preprocess again" in said


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["-d", "77", "-tr", TINY], "there is no data set 77"),
        (["-d", "901", "-tr", "nnUNetTrainerULit"], "did you mean nnUNetTrainerULite"),
        (["-d", "901"], "give a trainer with -tr"),
        (["-d", "901", "-tr", TINY, "-p", "Other"], "Other.json does not exist"),
        (["-d", "901", "-tr", TINY, "-c", "3d_fullres"], "-c 3d_fullres is not in the plans"),
        (["-d", "901", "-tr", TINY, "--memory", "0"], "--memory must be above 0"),
        (["-d", "901", "-tr", TINY, "--memory", "0.0003"], "too little"),
        (["-d", "901", "-tr", TINY, "--suffix", "a/b"], "--suffix becomes part of a file name"),
        (["-d", "901", "--like", "lits"], "needs a configuration in 3D"),
    ],
)
def test_mistakes_are_one_line(
    dataset: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("SegResNet", "pads any patch to its own fixed stages"),
        ("SwinUNETR", "pads any patch to its own fixed stages"),
        ("UNETR", "pads any patch to its own fixed stages"),
        ("UMambaBot", "takes its stages from nnU-Net's own plans"),
        ("SlimUNet", "takes its stages from nnU-Net's own plans"),
    ],
)
def test_networks_that_need_no_plans_say_why(
    name: str, reason: str, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "-d", "901", "-tr", f"nnUNetTrainer{name}"]) == 2
    error = capsys.readouterr().err
    assert f"nnUNetTrainer{name} {reason}" in error and "-p nnUNetPlans" in error


@pytest.mark.parametrize(
    ("chosen", "first"), [([], "3d_fullres"), (["-c", "2d"], "2d"), (["-c", "3d_lowres"], "3d_lowres")]
)
def test_volumes_are_to_be_trained_as_volumes(
    chosen: list[str], first: str, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """nnU-Net's plans of volumes begin with 2d."""
    file = dataset / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    volumes = base_plans((16, 16, 16), (16, 16, 16))[0]["configurations"]["3d_fullres"]
    plans["configurations"] |= {"3d_lowres": volumes, "3d_fullres": volumes}
    plans["original_median_shape_after_transp"] = [16, 64, 64]
    file.write_text(json.dumps(plans))
    assert main(["plan", "-d", "901", "-tr", TINY, *chosen]) == 0
    assert f"nnUNetv2_train 901 {first} 0 -tr {TINY}" in capsys.readouterr().out


def test_missing_fingerprint_is_named(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dataset / "dataset_fingerprint.json").unlink()
    assert main(["plan", "-d", "901", "-tr", TINY]) == 2
    assert "nnUNetv2_extract_fingerprint -d 901" in capsys.readouterr().err


def test_unwritable_folder_is_named(
    dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", refuse)
    assert main(["plan", "-d", "901", "-tr", TINY]) == 2
    assert "nnUNetPlans_ultralight_unet_T.json could not be written: Permission denied" in capsys.readouterr().err
