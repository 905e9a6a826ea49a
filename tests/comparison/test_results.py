"""Reading result folders: all the places where nnU-Net leaves scores, and everything that can be wrong with them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from result_folders import TWO_LABELS, Dataset, balls, folds_of, truth_map, worse, write_summary

from nnunetv2_lightnets.comparison.cases import as_structure, case_name
from nnunetv2_lightnets.comparison.comparable import check_comparable
from nnunetv2_lightnets.comparison.results import read_result, read_results, read_summary, split_name
from nnunetv2_lightnets.errors import LightNetsError

REGIONS = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return balls(tmp_path_factory.mktemp("data with spaces"), 6)


@pytest.fixture(scope="module")
def trainer(dataset: Dataset) -> Path:
    return dataset.trainer("nnUNetTrainer", folds_of(dataset, 0.1), budget=1000)


def region_dataset(root: Path) -> Dataset:
    """Overlapping regions and voxels that are not to be scored."""
    truths = {}
    for i in range(3):
        truth = truth_map(i)
        truth[:2] = 3
        truths[f"case_{i}"] = truth
    return Dataset(root, truths, REGIONS, regions_class_order=[1, 2])


# ------------------------------------------------------------------------------------------------------------ reading


def test_summaries_of_the_tests_are_nnunets(tmp_path):
    """The fixture leaves out nnU-Net's worker processes and nothing else."""
    dataset = region_dataset(tmp_path)
    folder = dataset.predictions(tmp_path / "p", {c: worse(t, 1, 0.2) for c, t in dataset.truths.items()})
    write_summary(folder, dataset.labels, dataset.description)
    theirs = tmp_path / "theirs.json"
    compute_metrics_on_folder(
        str(dataset.labels), str(folder), str(theirs), SimpleITKIO(), ".nii.gz", [(1, 2), (2,)], 3, num_processes=1
    )
    assert json.loads((folder / "summary.json").read_text()) == json.loads(theirs.read_text())


def test_a_trainer_folder_pools_its_folds(dataset, trainer):
    result = read_result(trainer, "default")
    assert sorted(result.cases) == sorted(dataset.truths)
    assert result.folds == ("0", "1")
    assert result.structures == ((1,), (2,))
    assert [result.structure_name(s) for s in result.structures] == ["anterior", "posterior"]
    assert result.budgets == ("1000 epochs x 250 iterations, batch 2",)
    summary = json.loads((trainer / "fold_1" / "validation" / "summary.json").read_text())
    for entry in summary["metric_per_case"]:
        case = result.cases[case_name(entry["prediction_file"])]
        assert case.fold == "1"
        assert case.metrics[(2,)] == entry["metrics"]["2"]
        assert case.prediction.is_file()


def test_every_place_nnunet_leaves_scores_in(trainer, tmp_path):
    pooled = tmp_path / "crossval_results_folds_0"
    shutil.copytree(trainer / "fold_0" / "validation", pooled)
    places = [
        trainer / "fold_0",
        trainer / "fold_0" / "validation",
        trainer / "fold_0" / "validation" / "summary.json",
        pooled,
    ]
    read = [read_result(place, "x") for place in places]
    assert all(sorted(r.cases) == sorted(read[0].cases) for r in read)
    assert [r.folds for r in read] == [("0",), ("0",), ("0",), ()]
    one_fold = read_result(trainer, "x", folds=["0"])
    assert {c: case.metrics for c, case in one_fold.cases.items()} == {c: x.metrics for c, x in read[0].cases.items()}


def test_a_moved_folder_finds_its_predictions(trainer, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(trainer / "fold_0" / "validation", moved)
    file = moved / "summary.json"
    file.write_text(file.read_text().replace(str(trainer), "C:\\\\old\\\\place"))
    cases = read_summary(file)
    assert sorted(case.name for case in cases) == ["case_00", "case_02", "case_04"]
    assert all(case.prediction.parent == moved and case.prediction.is_file() for case in cases)


def test_predictions_are_scored_as_nnunet_scores_them(tmp_path):
    dataset = region_dataset(tmp_path)
    maps = {case: worse(truth, 5, 0.3) for case, truth in dataset.truths.items()}
    trained = dataset.trainer("nnUNetTrainer", {0: maps})
    predicted = dataset.predictions(tmp_path / "predicted", maps)
    expected = read_result(trained, "summary")
    found = read_result(predicted, "predictions", labels=dataset.labels)
    assert found.structures == expected.structures == ((1, 2), (2,))
    assert found.ignore_label == 3
    assert [found.structure_name(s) for s in found.structures] == ["whole", "core"]
    for name, case in expected.cases.items():
        assert found.cases[name].metrics == case.metrics
    assert not (predicted / "summary.json").exists()


def test_fold_all_is_no_validation(dataset, tmp_path):
    everything = folds_of(dataset, 0.1, n_folds=1)[0]
    trainer = Dataset(tmp_path, dataset.truths, TWO_LABELS).trainer("nnUNetTrainer", {"all": everything})
    with pytest.raises(LightNetsError, match="held out"):
        read_result(trainer, "x")
    assert read_result(trainer, "x", folds=["all"]).folds == ("all",)


def test_names(trainer, dataset, tmp_path):
    other = dataset.trainer("nnUNetTrainerULite", folds_of(dataset, 0.2))
    assert [r.name for r in read_results([str(trainer), str(other)])] == ["nnUNetTrainer", "nnUNetTrainerULite"]
    assert [r.name for r in read_results([f"a={trainer}", f"b={other}"])] == ["a", "b"]
    resenc = trainer.with_name("nnUNetTrainer__nnUNetResEncUNetMPlans__3d_fullres")
    shutil.copytree(trainer, resenc)
    assert [r.name for r in read_results([str(trainer / "fold_0"), str(resenc)])] == [
        "nnUNetTrainer__nnUNetPlans__3d_fullres",
        "nnUNetTrainer__nnUNetResEncUNetMPlans__3d_fullres",
    ]
    shutil.rmtree(resenc)
    with pytest.raises(LightNetsError, match="two results are named 'a'"):
        read_results([f"a={trainer}", f"a={other}"])
    with pytest.raises(LightNetsError, match="the same folder"):
        read_results([str(trainer), f"again={trainer}"])
    strange = tmp_path / "lr=0.01"
    strange.mkdir()
    assert split_name(str(strange)) == (None, strange)


@pytest.mark.parametrize(
    ("text", "structure"),
    [("1", (1,)), (3, (3,)), ("(1, 2)", (1, 2)), ("(3,)", (3,)), ([2, 1], (1, 2)), ("mean", None), ("1.5", None)],
)
def test_structures(text, structure):
    assert as_structure(text) == structure


@pytest.mark.parametrize(
    ("file", "name"),
    [("/a b/x_1.nii.gz", "x_1"), ("C:\\a\\x.y.png", "x.y"), ("x.nii", "x"), ("plain", "plain")],
)
def test_case_names(file, name):
    assert case_name(file) == name


# ------------------------------------------------------------------------------------------------------ what is wrong


def edited(trainer: Path, target: Path, edit: Any) -> Path:
    """A copy of fold 0's validation folder whose summary.json has been edited."""
    shutil.copytree(trainer / "fold_0" / "validation", target)
    content = json.loads((target / "summary.json").read_text())
    edit(content)
    (target / "summary.json").write_text(json.dumps(content))
    return target


def metrics(content: dict[str, Any], case: int = 0, label: str = "1") -> dict[str, Any]:
    return content["metric_per_case"][case]["metrics"][label]


def test_a_truncated_summary_is_refused(trainer, tmp_path):
    file = tmp_path / "summary.json"
    whole = (trainer / "fold_0" / "validation" / "summary.json").read_text()
    for length in (0, 10, len(whole) // 2, len(whole) - 2):
        file.write_text(whole[:length])
        with pytest.raises(LightNetsError, match=r"summary\.json is truncated or not JSON at line \d+; score"):
            read_result(tmp_path, "x")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("metric_per_case"), "no cases under metric_per_case"),
        (lambda c: c.update(metric_per_case=[]), "no cases under metric_per_case"),
        (lambda c: c["metric_per_case"].append(c["metric_per_case"][0]), "holds case case_00 twice"),
        (lambda c: c["metric_per_case"][1].pop("metrics"), "case 2 of 3 has no metrics"),
        (lambda c: c["metric_per_case"][1].pop("prediction_file"), "case 2 of 3 names no reference_file"),
        (lambda c: c["metric_per_case"][1]["metrics"].pop("2"), "case case_02 for label 1"),
        (lambda c: c["metric_per_case"][0]["metrics"].update(tumour={}), "'tumour' is no label"),
        (lambda c: metrics(c).update(Dice="0.9"), "Dice is '0.9', not a number"),
        (lambda c: metrics(c).pop("n_ref"), "label 1 has no n_ref"),
        (lambda c: [x["metrics"].clear() for x in c["metric_per_case"]], "no scores of any foreground label"),
    ],
)
def test_an_invalid_summary_is_refused(trainer, tmp_path, edit, message):
    folder = edited(trainer, tmp_path / "edited", edit)
    with pytest.raises(LightNetsError, match=message) as error:
        read_result(folder, "x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["metric_per_case"].pop(), "B lacks 1 of the 3 cases of A: case_04"),
        (lambda c: c["metric_per_case"][0].update(prediction_file="/x/new.nii.gz"), "B lacks 1 of the 3.*case_00"),
        (lambda c: [x["metrics"].pop("2") for x in c["metric_per_case"]], "B is not scored for label 2, which A is"),
        (
            lambda c: [x["metrics"].update({"5": metrics(c)}) for x in c["metric_per_case"]],
            "A is not scored for label 5",
        ),
        (lambda c: metrics(c).pop("Dice"), "B has no Dice; it has FN, FP, IoU"),
        (
            lambda c: metrics(c).update(Dice=math.nan),
            "case case_00, label 1: Dice is NaN though the structure is there",
        ),
        (lambda c: metrics(c).update(Dice=1.5), "Dice is 1.5"),
        (lambda c: metrics(c).update(n_ref=7), r"label 1: the reference has \d+ voxels in A and 7 in B"),
    ],
)
def test_what_differs_is_not_compared(trainer, tmp_path, edit, message):
    reference = read_result(trainer / "fold_0", "A")
    other = read_result(edited(trainer, tmp_path / "edited", edit), "B")
    with pytest.raises(LightNetsError, match=message) as error:
        check_comparable([reference, other], ["Dice"])
    assert "\n" not in str(error.value)


def test_other_names_of_a_label_are_another_data_set(trainer, tmp_path):
    other = edited(trainer, tmp_path / "edited", lambda c: None)
    description = {"labels": {"background": 0, "liver": 1, "posterior": 2}}
    (other / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(LightNetsError, match="label 1 is 'anterior' in A and 'liver' in B"):
        check_comparable([read_result(trainer / "fold_0", "A"), read_result(other, "B")], ["Dice"])


def test_background_and_null_are_understood(trainer, tmp_path):
    def edit(content):
        for entry in content["metric_per_case"]:
            entry["metrics"]["0"] = {"Dice": 0.99}
        metrics(content).update(Dice=None, n_ref=0, n_pred=0)

    result = read_result(edited(trainer, tmp_path / "edited", edit), "x")
    assert result.structures == ((1,), (2,))
    assert math.isnan(result.cases["case_00"].metrics[(1,)]["Dice"])


def test_a_case_in_two_folds_is_refused(dataset, tmp_path):
    folds = folds_of(dataset, 0.1)
    folds[1]["case_00"] = folds[0]["case_00"]
    trainer = Dataset(tmp_path, dataset.truths, TWO_LABELS).trainer("nnUNetTrainer", folds)
    with pytest.raises(LightNetsError, match="case case_00 is in fold 0 and in fold 1"):
        read_result(trainer, "x")


def test_missing_folders_folds_and_labels(dataset, trainer, tmp_path):
    with pytest.raises(LightNetsError, match=r"nowhere does not exist"):
        read_results([str(tmp_path / "nowhere"), str(trainer)])
    with pytest.raises(LightNetsError, match=r"no fold_4/validation/summary\.json"):
        read_result(trainer, "x", folds=["0", "4"])
    unfinished = tmp_path / "nnUNetTrainer__p__2d"
    (unfinished / "fold_0").mkdir(parents=True)
    with pytest.raises(LightNetsError, match="held out"):
        read_result(unfinished, "x")
    with pytest.raises(LightNetsError, match="add -gt"):
        read_result(tmp_path, "x")
    with pytest.raises(LightNetsError, match="is no folder and no summary"):
        read_result(dataset.labels / "case_00.nii.gz", "x")


def test_predictions_must_fit_their_labels(dataset, tmp_path):
    some = dict(list(dataset.truths.items())[:4])
    folder = dataset.predictions(tmp_path / "some", some)
    with pytest.raises(LightNetsError, match="no prediction for case_04, case_05 of"):
        read_result(folder, "x", labels=dataset.labels)
    assert len(read_result(folder, "x", labels=dataset.labels, chill=True).cases) == 4
    dataset.predictions(folder, {"stranger": truth_map(0)})
    with pytest.raises(LightNetsError, match=r"no label in .* for stranger\.nii\.gz"):
        read_result(folder, "x", labels=dataset.labels, chill=True)
    (folder / "stranger.nii.gz").unlink()
    dataset.predictions(folder, {"case_00": np.zeros((3, 4, 5), np.uint8)})
    with pytest.raises(
        LightNetsError, match=r"case_00\.nii\.gz cannot be scored against .*case_00\.nii\.gz: "
    ) as error:
        read_result(folder, "x", labels=dataset.labels, chill=True)
    assert "\n" not in str(error.value)
    with pytest.raises(LightNetsError, match="its labels are unknown; give it with -djfile"):
        lonely = shutil.copytree(dataset.labels, tmp_path / "lonely" / "labels")
        read_result(dataset.predictions(tmp_path / "p", some), "x", labels=lonely, chill=True)
    with pytest.raises(LightNetsError, match="declares no labels"):
        (tmp_path / "d.json").write_text("{}")
        read_result(folder, "x", labels=dataset.labels, dataset_json=tmp_path / "d.json")
