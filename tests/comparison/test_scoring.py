"""Normalised surface Dice: analytic cases, and the voxels that nnU-Net scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import SimpleITK as sitk
from result_folders import SPACING, TWO_LABELS, Dataset, ball, balls, folds_of, truth_map, worse, write_map

from nnunetv2_lightnets.comparison import scoring
from nnunetv2_lightnets.comparison.results import read_result
from nnunetv2_lightnets.comparison.scoring import add_nsd, for_each_case, nsd
from nnunetv2_lightnets.comparison.volumes import read_segmentation, unit_of_spacing
from nnunetv2_lightnets.errors import LightNetsError

pytest.importorskip("monai")


def bar(width: int) -> np.ndarray:
    mask = np.zeros((220, 30), bool)
    mask[5:205, 5 : 5 + width] = True
    return mask


def test_a_shifted_edge_counts_by_its_length():
    """A bar 200 long, 5 or 6 wide: one long edge of each is 1 pixel off, the other edge and the ends agree."""
    total = 2 * (200 + 5) + 2 * (200 + 6)
    assert nsd(bar(5), bar(6), (1, 1), 0.5) == pytest.approx(1 - 2 * 200 / total, abs=0.01)
    assert nsd(bar(5), bar(6), (1, 1), 1.0) == 1
    # In mm: the edge is 2 mm off where pixels are 2 mm wide; the ends are twice as long.
    total = 2 * (200 + 10) + 2 * (200 + 12)
    assert nsd(bar(5), bar(6), (1, 2), 1.9) == pytest.approx(1 - 2 * 200 / total, abs=0.01)
    assert nsd(bar(5), bar(6), (1, 2), 2.0) == 1


def test_spheres_within_and_beyond_the_tolerance():
    small, large = (ball((40, 40, 40), (20, 20, 20), radius) for radius in (10, 13))
    assert nsd(small, large, (1, 1, 1), 1.5) < 0.05
    assert nsd(small, large, (1, 1, 1), 4.5) == 1
    assert nsd(small, large, (0.3, 0.3, 0.3), 1.5) == 1
    assert nsd(small, large, (1, 1, 1), 2) == nsd(large, small, (1, 1, 1), 2)


def test_surfaces_at_the_border_of_the_image_count():
    """A slab through the whole image, one slice thinner: not equal, though the removed face was the image's own."""
    slab = np.ones((6, 20, 20), bool)
    thinner = slab.copy()
    thinner[0] = False
    assert nsd(slab, slab, (3, 1, 1), 0.5) == 1
    faces, sides = 400, 20 * 4 * 3 * 6
    assert nsd(slab, thinner, (3, 1, 1), 0.5) == pytest.approx(1 - 2 * faces / (4 * faces + 2 * sides), abs=0.1)


def test_empty_masks_follow_dice():
    something, nothing = bar(5), np.zeros((220, 30), bool)
    assert math.isnan(nsd(nothing, nothing, (1, 1), 1))
    assert nsd(something, nothing, (1, 1), 1) == 0
    assert nsd(nothing, something, (1, 1), 1) == 0


def test_spacing_is_that_of_the_array(tmp_path):
    write_map(tmp_path / "volume.nii.gz", np.zeros((4, 5, 6), np.uint8), SPACING)
    array, spacing = read_segmentation(tmp_path / "volume.nii.gz", {})
    assert (array.shape, spacing) == ((4, 5, 6), pytest.approx(SPACING))
    write_map(tmp_path / "slice.nii.gz", np.zeros((1, 5, 6), np.uint8), SPACING)
    array, spacing = read_segmentation(tmp_path / "slice.nii.gz", {})
    assert (array.shape, spacing) == ((5, 6), pytest.approx(SPACING[1:]))
    (tmp_path / "broken.nii.gz").write_bytes(b"no image")
    with pytest.raises(LightNetsError, match=r"broken\.nii\.gz cannot be read: "):
        read_segmentation(tmp_path / "broken.nii.gz", {})


def test_nsd_of_result_folders(tmp_path):
    """Regions, and voxels with the ignore label, which hold a gross error that must not count."""
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    truth = truth_map(0)
    prediction = truth.copy()
    truth[6:] = 3
    prediction[6:] = 2
    dataset = Dataset(tmp_path, {"case": truth}, labels, regions_class_order=[1, 2])
    result = read_result(dataset.trainer("nnUNetTrainer", {0: {"case": prediction}}), "x")
    add_nsd([result], 1.0, None, 1)
    assert result.cases["case"].metrics[(1, 2)]["NSD"] == 1
    assert result.cases["case"].metrics[(2,)]["NSD"] == 1
    # Without dataset.json the ignored voxels would be scored: noticed, not scored wrongly.
    result.dataset_json = {}
    prediction_of_ignored = np.where(truth == 3, 2, truth).astype(np.uint8)
    dataset.predictions(dataset.labels, {"case": prediction_of_ignored})
    with pytest.raises(LightNetsError, match=r"voxels of region \(1, 2\), not the \d+ that were scored"):
        add_nsd([result], 1.0, None, 1)


def test_missing_files_are_named(tmp_path):
    dataset = balls(tmp_path, 2)
    result = read_result(dataset.trainer("nnUNetTrainer", folds_of(dataset, 0.1)), "x")
    result.cases["case_01"].prediction.unlink()
    with pytest.raises(LightNetsError, match=r"--nsd needs .*case_01\.nii\.gz, which is gone; keep the predictions"):
        add_nsd([result], 1.0, None, 1)
    with pytest.raises(LightNetsError, match=r"--nsd needs .*nowhere.*case_00\.nii\.gz.*with -gt"):
        add_nsd([result], 1.0, tmp_path / "nowhere", 1)


def test_worker_processes_give_the_same_in_the_same_order(monkeypatch):
    jobs = [(float(i), 1.0) for i in range(20)]
    here = for_each_case(math.hypot, jobs, 2, "test")
    monkeypatch.setattr(scoring, "_WORTH_WORKERS", 0)
    assert for_each_case(math.hypot, jobs, 2, "test") == here == [math.hypot(*job) for job in jobs]


def test_pictures_are_measured_in_pixels(tmp_path):
    write_map(tmp_path / "volume.nii.gz", np.zeros((4, 5, 6), np.uint8), SPACING)
    assert unit_of_spacing(tmp_path / "volume.nii.gz", {}) == "mm"
    picture = sitk.GetImageFromArray(np.arange(30, dtype=np.uint8).reshape(5, 6))
    for ending in ("png", "tif"):
        sitk.WriteImage(picture, str(tmp_path / f"picture.{ending}"))
        array, spacing = read_segmentation(tmp_path / f"picture.{ending}", {})
        assert (array.shape, spacing) == ((5, 6), (1, 1))
        assert unit_of_spacing(tmp_path / f"picture.{ending}", {}) == "px"
    named = {"overwrite_image_reader_writer": "NibabelIO"}
    assert read_segmentation(tmp_path / "volume.nii.gz", named)[0].shape == (4, 5, 6)


def test_worse_predictions_score_less(tmp_path):
    dataset = Dataset(tmp_path, {"case": truth_map(0)}, TWO_LABELS)
    scores = []
    for share in (0, 0.1, 0.5):
        result = read_result(
            dataset.trainer(f"nnUNetTrainer{share}", {0: {"case": worse(truth_map(0), 0, share)}}), "x"
        )
        add_nsd([result], 1.0, None, 1)
        scores.append(result.cases["case"].metrics[(1,)]["NSD"])
    assert scores[0] == 1
    assert scores[0] > scores[1] > scores[2]
