"""The table of accuracies is what the kept files say."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import accuracy
import numpy as np
import pytest
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from result_folders import Dataset, balls, worse, write_summary

from nnunetv2_lightnets.nnunet.plans import patch_setting

LOST = {"nnUNetTrainer_2epochs_5iters": 0.05, "nnUNetTrainerULite_2epochs_5iters": 0.3}
RUN = accuracy.Run(
    "Dataset001_Balls", "3d_fullres", None, 2, "_2epochs_5iters", ("nnUNetTrainer", "nnUNetTrainerULite"), 2
)


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Dataset, Path]:
    """Eight cases, numbered from 1, scored for two trainers, in the layout of the recorded results."""
    dataset = balls(tmp_path, 8)
    dataset = Dataset(tmp_path / "numbered", dict(zip(names(8), dataset.truths.values(), strict=True)),
                      dataset.description["labels"])  # fmt: skip
    folder = tmp_path / "accuracy" / RUN.dataset
    for seed, (trainer, lost) in enumerate(LOST.items()):
        maps = {case: worse(truth, 10 * seed, lost) for case, truth in dataset.truths.items()}
        write_summary(dataset.predictions(folder / trainer, maps), dataset.labels, dataset.description)
        facts = {"parameters": 886_000, "macs": 186e6, "patch": [8, 20, 18], "batch": 2}
        facts |= {"iterations": accuracy.iterations(trainer), "cases trained on": 20}
        (folder / trainer / "training.json").write_text(json.dumps(facts))
    (folder / "dataset.json").write_text(json.dumps(dataset.description))
    return dataset, folder.parent


def names(n: int) -> list[str]:
    return [f"case_{i:03d}" for i in range(1, n + 1)]


def test_the_table_has_means_over_cases_and_paired_differences(kept: tuple[Dataset, Path]) -> None:
    lines = accuracy.table(RUN, kept[1])
    assert lines[0] == (
        "**Dataset001_Balls, 3d_fullres**: 10 iterations of 2 patches of 8×20×18, 20 cases to train on, 8 scans of 4 "
        "subjects to validate on."
    )
    header, _, first, second = (line.strip("| ").split(" | ") for line in lines[2:])
    of = [dict(zip(header, row, strict=False)) for row in (first, second)]
    assert [row["trainer"] for row in of] == ["nnUNetTrainer", "nnUNetTrainerULite"]
    assert of[1]["parameters (M)"] == "0.89" and of[1]["GMAC"] == "0.19"
    means = []
    for row, trainer in zip(of, LOST, strict=True):
        summary = json.loads((kept[1] / RUN.dataset / trainer / "summary.json").read_text())
        dice = np.array([[case["metrics"][label]["Dice"] for label in "12"] for case in summary["metric_per_case"]])
        means.append(100 * dice.mean())
        assert row["Dice, anterior"] == f"{100 * dice[:, 0].mean():.1f}"
        assert row["mean Dice"].startswith(f"{means[-1]:.1f} [")
    assert of[1]["difference"].startswith(f"{means[1] - means[0]:+.1f} [-")
    # Of four subjects no rank test can be sure: the smallest two-sided p-value is 2 / 2**4.
    assert of[1]["p (Holm)"] == f"{2 / 2**4:.2g}"
    assert of[1]["verdict"].startswith("inconclusive")


def test_cases_that_are_subjects_need_no_number(kept: tuple[Dataset, Path]) -> None:
    for file in kept[1].glob("*/*/summary.json"):
        file.write_text(file.read_text().replace("case_", "case_a"))
    assert accuracy.table(replace(RUN, scans_of_a_subject=1), kept[1])[0].endswith("8 cases to validate on.")


def test_nothing_is_compared_without_the_reference(kept: tuple[Dataset, Path]) -> None:
    shutil.rmtree(kept[1] / RUN.dataset / "nnUNetTrainer_2epochs_5iters")
    assert accuracy.table(RUN, kept[1]) == ["Dataset001_Balls: not trained yet."]


def test_the_budgets_of_a_data_set_are_equal() -> None:
    assert all(accuracy.iterations(run.budget) >= 500 for run in accuracy.RUNS)
    assert accuracy.iterations(accuracy.HIPPOCAMPUS.budget) >= 1000


def test_one_recipe_trains_every_network_that_the_plans_name(kept: tuple[Dataset, Path]) -> None:
    run = replace(RUN, recipe="nnUNetTrainer")
    assert {run.trains(trainer) for trainer in run.trainers} == {"nnUNetTrainer_2epochs_5iters"}
    assert len({run.plans(trainer) for trainer in run.trainers}) == 2
    assert accuracy.table(run, kept[1]) == ["Dataset001_Balls_nnUNetTrainer: not trained yet."]
    (kept[1] / RUN.dataset).rename(kept[1] / run.name)
    lines = accuracy.table(run, kept[1])
    assert lines[0].startswith("**Dataset001_Balls, 3d_fullres, all with nnUNetTrainer**: 10 iterations")
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| network of", "|---|---|---|---|---|---|---|---|---|", "| nnUNetTrainer", "| nnUNetTrainerULite"
    ]  # fmt: skip


@pytest.mark.slow
def test_named_networks_have_the_patch_and_batch_of_the_run(tmp_path: Path) -> None:
    run = replace(accuracy.NUCLEI, recipe="nnUNetTrainer", trainers=accuracy.TWINS)
    setting = patch_setting((128, 128), 1, 2)
    (entry,) = setting.plans["configurations"].values()
    shared = setting.plans | {"configurations": {"2d": entry}, "original_median_shape_after_transp": [1, 256, 256]}
    entry["median_image_size_in_voxels"] = [256, 256]
    (tmp_path / f"{accuracy.PLANS}.json").write_text(json.dumps(shared))
    (tmp_path / "dataset.json").write_text(json.dumps(setting.dataset_json | {"numTraining": 100}))
    scan = []
    for trainer in run.trainers:
        accuracy.name_network(tmp_path, run, trainer)
        plans = json.loads((tmp_path / f"{run.plans(trainer)}.json").read_text())
        planned = PlansManager(plans).get_configuration("2d")
        assert (plans["plans_name"], list(planned.patch_size), planned.batch_size) == (
            run.plans(trainer),
            [128, 128],
            4,
        )
        arguments = planned.network_arch_class_name, planned.network_arch_init_kwargs, []
        network = get_network_from_plans(*arguments, 1, 2, deep_supervision=True)
        scan.append(any("A_log" in name for name, _ in network.named_parameters()))
    assert scan == [False, True]
