"""Small nnU-Net result folders, made as nnU-Net makes them: label maps on disk, scored by its own evaluation."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray

Map = NDArray[np.uint8]
TWO_LABELS = {"background": 0, "anterior": 1, "posterior": 2}
SPACING = (2.0, 1.0, 1.5)  # (Z, Y, X) mm


def dataset_json(labels: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "channel_names": {"0": "MRI"},
        "labels": dict(labels),
        "numTraining": 1,
        "file_ending": ".nii.gz",
        **more,
    }


def write_map(file: Path, array: NDArray[Any], spacing: Sequence[float] = SPACING) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


def ball(shape: Sequence[int], centre: Sequence[float], radius: float) -> NDArray[np.bool_]:
    grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2


def truth_map(seed: int) -> Map:
    """Two balls in a small volume, elsewhere in each case."""
    rng = np.random.default_rng(seed)
    array = np.zeros((8, 20, 18), np.uint8)
    array[ball(array.shape, (3.5 + rng.uniform(-1, 1), 6, 6), 4)] = 1
    array[ball(array.shape, (4, 13 + rng.uniform(-1, 1), 11), 3.5)] = 2
    return array


def worse(truth: Map, seed: int, share: float) -> Map:
    """A prediction: a share of the foreground voxels is lost, as if by chance."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(truth.shape) < share, 0, truth).astype(np.uint8)


def write_summary(folder: Path, labels_folder: Path, description: dict[str, Any]) -> None:
    """``summary.json`` of a folder of predictions: what ``compute_metrics_on_folder`` does, without its processes."""
    manager = LabelManager(description["labels"], description.get("regions_class_order"))
    structures = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    per_case = [
        compute_metrics(str(labels_folder / file.name), str(file), SimpleITKIO(), structures, manager.ignore_label)
        for file in sorted(folder.glob("*.nii.gz"))
    ]
    names = list(per_case[0]["metrics"][structures[0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a structure that is nowhere has no mean
        means = {s: {m: np.nanmean([c["metrics"][s][m] for c in per_case]) for m in names} for s in structures}
    foreground = {m: np.mean([means[s][m] for s in structures]) for m in names}
    for part in (*per_case, means, foreground):
        recursive_fix_for_json_export(part)
    summary = {"metric_per_case": per_case, "mean": means, "foreground_mean": foreground}
    save_summary_json(summary, str(folder / "summary.json"))


class Dataset:
    """Labels and images in nnU-Net's raw layout, and result folders of trainers on them."""

    def __init__(self, root: Path, truths: Mapping[str, Map], labels: Mapping[str, Any], **more: Any) -> None:
        self.root, self.truths = root, dict(truths)
        self.description = dataset_json(labels, **more)
        self.labels = root / "raw" / "Dataset001_Balls" / "labelsTr"
        for case, truth in truths.items():
            write_map(self.labels / f"{case}.nii.gz", truth)
            image = truth.astype(np.float32) + np.random.default_rng(0).normal(0, 0.2, truth.shape).astype(np.float32)
            write_map(self.labels.with_name("imagesTr") / f"{case}_0000.nii.gz", image)
        (self.labels.parent / "dataset.json").write_text(json.dumps(self.description))

    def predictions(self, folder: Path, maps: Mapping[str, Map]) -> Path:
        for case, array in maps.items():
            write_map(folder / f"{case}.nii.gz", array)
        return folder

    def trainer(self, name: str, folds: Mapping[int | str, Mapping[str, Map]], budget: int | None = None) -> Path:
        """A trained model's folder: ``name__nnUNetPlans__3d_fullres`` with a validation folder for each fold."""
        trainer = self.root / "results" / "Dataset001_Balls" / f"{name}__nnUNetPlans__3d_fullres"
        for fold, maps in folds.items():
            validation = self.predictions(trainer / f"fold_{fold}" / "validation", maps)
            write_summary(validation, self.labels, self.description)
            if budget is not None:
                noted = {"num_epochs": str(budget), "num_iterations_per_epoch": "250", "batch_size": "2"}
                (validation.parent / "debug.json").write_text(json.dumps(noted))
        (trainer / "dataset.json").write_text(json.dumps(self.description))
        return trainer


def balls(root: Path, n: int = 10) -> Dataset:
    """``n`` cases of two balls."""
    return Dataset(root, {f"case_{i:02d}": truth_map(i) for i in range(n)}, TWO_LABELS)


def folds_of(dataset: Dataset, share: float, seed: int = 0, n_folds: int = 2) -> dict[int | str, dict[str, Map]]:
    """Predictions of all cases in folds, each with a share of its foreground lost."""
    maps = {case: worse(truth, seed + i, share) for i, (case, truth) in enumerate(dataset.truths.items())}
    cases = sorted(maps)
    return {fold: {case: maps[case] for case in cases[fold::n_folds]} for fold in range(n_folds)}


def environment() -> dict[str, str]:
    """For the command in a process of its own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
