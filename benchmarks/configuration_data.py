"""Small data sets of every kind that nnU-Net trains on, made from a user's real images.

996 to 999 are nnU-Net's own integration tests (``dataset_conversion/datasets_for_integration_tests`` of its
repository): one data set with two labels, Hippocampus there and here, as it is, with an ignore label, with regions,
and with both. The others are cut, resampled or filtered from the same volumes, and from RGB images.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunet_server import Commands

REGIONS = {"background": 0, "whole": [1, 2], "first": 1}
IGNORE_IN_REGIONS = 3
SCRIBBLED_SHARE = 0.1 / 3  # of the slices along each axis keep their label, as in nnU-Net's data set 996


@dataclass(frozen=True)
class Volume:
    """One case: image (C, D, H, W) float32, label (D, H, W) uint8, voxel size (D, H, W) in mm."""

    image: np.ndarray
    label: np.ndarray
    spacing: tuple[float, float, float]


@dataclass(frozen=True)
class DataSet:
    """Number, name and labels of a data set, and how its cases come from the source's."""

    number: int
    name: str
    labels: dict[str, Any]
    has_3d: bool = True

    @property
    def folder(self) -> str:
        """Name of its folder in nnU-Net's data folders."""
        return f"Dataset{self.number}_{self.name}"

    @property
    def outputs(self) -> set[int]:
        """Values that a prediction may hold."""
        labels = {key: value for key, value in self.labels.items() if key != "ignore"}
        return {v for value in labels.values() for v in (value if isinstance(value, list) else [value])}


PLAIN = {"background": 0, "first": 1, "second": 2}
DATA_SETS = {
    data.name: data
    for data in (
        DataSet(999, "Plain", PLAIN),
        DataSet(998, "Ignore", {"background": 0, "first": 1, "ignore": 2}),
        DataSet(997, "Regions", REGIONS),
        DataSet(996, "RegionsIgnore", REGIONS | {"ignore": IGNORE_IN_REGIONS}),
        DataSet(995, "Channels", PLAIN),
        DataSet(994, "RGB", {"background": 0, "object": 1}, has_3d=False),
        DataSet(993, "Small", PLAIN),
        DataSet(992, "Thick", PLAIN),
        DataSet(991, "ThreeSlices", PLAIN),
    )
}
# Of the data sets with few slices: a case more would only take time.
LARGE = {"Thick": (20, 256, 224), "ThreeSlices": (3, 512, 512)}
SMALL_SIDE = 12


def choose_cases(source: Path, per_fold: int = 2) -> tuple[list[list[str]], str]:
    """Names of the first cases of each fold of the source, so that its own split is kept, and one for testing.

    A source without ``splits_final.json`` is cut into five runs of its sorted cases.
    """
    ending = json.loads((source / "dataset.json").read_text())["file_ending"]
    names = sorted(file.name.removesuffix(ending) for file in (source / "labelsTr").glob(f"*{ending}"))
    split = source / "splits_final.json"
    folds = (
        [fold["val"] for fold in json.loads(split.read_text())]
        if split.is_file()
        else [list(part) for part in np.array_split(names, 5)]
    )
    chosen = [sorted(fold)[:per_fold] for fold in folds]
    taken = {name for fold in chosen for name in fold}
    return chosen, next((name for name in reversed(names) if name not in taken), chosen[0][0])


def read_volume(source: Path, name: str) -> Volume:
    """A case of a data set with one channel and the labels 0, 1, 2, in nnU-Net's raw format."""
    ending = json.loads((source / "dataset.json").read_text())["file_ending"]
    image = sitk.ReadImage(str(source / "imagesTr" / f"{name}_0000{ending}"))
    label = sitk.ReadImage(str(source / "labelsTr" / f"{name}{ending}"))
    depth, height, width = image.GetSpacing()[::-1]
    return Volume(
        sitk.GetArrayFromImage(image).astype(np.float32)[None],
        sitk.GetArrayFromImage(label).astype(np.uint8),
        (depth, height, width),
    )


def variant(kind: str, volume: Volume, seed: int) -> Volume:
    """The case as data set ``kind`` holds it."""
    image, label, spacing = volume.image, volume.label, volume.spacing
    if kind == "RegionsIgnore":
        return Volume(image, scribble(label, np.random.default_rng(seed)), spacing)
    if kind == "Channels":
        itk = sitk.GetImageFromArray(image[0])
        filtered = (sitk.SmoothingRecursiveGaussian(itk, 1.0), sitk.GradientMagnitudeRecursiveGaussian(itk, 1.0))
        return Volume(np.concatenate([image, *(sitk.GetArrayFromImage(f)[None] for f in filtered)]), label, spacing)
    if kind == "Small":
        return crop_around_label(volume, SMALL_SIDE)
    if kind in LARGE:
        size = LARGE[kind]
        return Volume(resize(image[0], size, sitk.sitkLinear)[None], resize(label, size, sitk.sitkNearestNeighbor),
                      (6.0, 1.0, 1.0))  # fmt: skip
    return volume


def scribble(label: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """``label`` (D, H, W) on a few slices along each axis, the ignore label elsewhere."""
    sparse = np.full_like(label, IGNORE_IN_REGIONS)
    for axis, size in enumerate(label.shape):
        kept = generator.choice(size, max(1, round(size * SCRIBBLED_SHARE)), replace=False)
        index = (slice(None),) * axis + (kept,)
        sparse[index] = label[index]
    return sparse


def crop_around_label(volume: Volume, side: int) -> Volume:
    """A cube of ``side`` voxels with the middle of what is labelled in its middle, within the image."""
    middle = np.round(np.argwhere(volume.label > 0).mean(axis=0)).astype(int)
    sides = [min(side, size) for size in volume.label.shape]
    starts = [
        int(np.clip(m - s // 2, 0, size - s)) for m, s, size in zip(middle, sides, volume.label.shape, strict=True)
    ]
    cut = tuple(slice(start, start + s) for start, s in zip(starts, sides, strict=True))
    return Volume(volume.image[(slice(None), *cut)], volume.label[cut], volume.spacing)


def resize(array: np.ndarray, size: Sequence[int], interpolation: int) -> np.ndarray:
    """``array`` (D, H, W) sampled at ``size`` points over the same extent."""
    itk = sitk.GetImageFromArray(array)
    grid = sitk.Image([int(s) for s in size[::-1]], itk.GetPixelID())
    grid.SetSpacing([old * o / n for old, o, n in zip(itk.GetSpacing(), itk.GetSize(), grid.GetSize(), strict=True)])
    return sitk.GetArrayFromImage(sitk.Resample(itk, grid, sitk.Transform(), interpolation, 0.0, itk.GetPixelID()))


def write_case(folder: Path, name: str, volume: Volume, part: str) -> None:
    """Image channels and label of one case into ``imagesTr`` and ``labelsTr``, or those of ``part`` "Ts"."""

    def write(array: np.ndarray, file: Path) -> None:
        itk = sitk.GetImageFromArray(array)
        itk.SetSpacing(volume.spacing[::-1])
        sitk.WriteImage(itk, str(file))

    for channel, array in enumerate(volume.image):
        write(array, folder / f"images{part}" / f"{name}_{channel:04d}.nii.gz")
    write(volume.label, folder / f"labels{part}" / f"{name}.nii.gz")


def write_rgb(source: Path, folder: Path, side: int = 64) -> list[list[str]]:
    """Squares cut from the first ten RGB images of ``source``; two cases to a fold."""
    from skimage.io import imread, imsave

    names = sorted(file.stem for file in (source / "labelsTr").glob("*.png"))[:11]
    for i, name in enumerate(names):
        part = "Tr" if i < 10 else "Ts"
        image, label = imread(source / "imagesTr" / f"{name}_0000.png"), imread(source / "labelsTr" / f"{name}.png")
        imsave(folder / f"images{part}" / f"{name}_0000.png", image[:side, :side, :3], check_contrast=False)
        imsave(folder / f"labels{part}" / f"{name}.png", label[:side, :side], check_contrast=False)
    return [names[i : i + 2] for i in range(0, 10, 2)]


def write_raw(commands: Commands, kinds: Sequence[str], volumes: Path, rgb: Path | None) -> dict[str, list[list[str]]]:
    """Write the data sets ``kinds`` into nnUNet_raw; returns the cases of their folds."""
    folds_of: dict[str, list[list[str]]] = {}
    chosen, test = choose_cases(volumes)
    for kind in kinds:
        data = DATA_SETS[kind]
        folder = commands.raw / data.folder
        for sub in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        if kind == "RGB":
            assert rgb is not None
            folds, ending, channels = write_rgb(rgb, folder), ".png", ["R", "G", "B"]
        else:
            # Two cases are enough where each is large: one to train on, one to validate.
            folds = [[fold[0]] for fold in chosen[:2]] if kind in LARGE else chosen
            for seed, name in enumerate([name for fold in folds for name in fold]):
                write_case(folder, name, variant(kind, read_volume(volumes, name), seed), "Tr")
            write_case(folder, test, variant(kind, read_volume(volumes, test), 0), "Ts")
            channels = ["MRI", "smooth", "edges"] if kind == "Channels" else ["MRI"]
            ending = ".nii.gz"
        description: dict[str, Any] = {
            "channel_names": {str(i): channel for i, channel in enumerate(channels)},
            "labels": data.labels,
            "numTraining": sum(len(fold) for fold in folds),
            "file_ending": ending,
        }
        if data.labels.get("whole"):
            description["regions_class_order"] = [2, 1]
        (folder / "dataset.json").write_text(json.dumps(description, indent=1))
        folds_of[kind] = folds
    return folds_of


def prepare(commands: Commands, kinds: Sequence[str], volumes: Path, rgb: Path | None) -> None:
    """Write the data sets, plan, add the configurations that nnU-Net does not plan for small data, preprocess."""
    folds_of = write_raw(commands, kinds, volumes, rgb)
    numbers = [str(DATA_SETS[kind].number) for kind in kinds]
    commands.must("nnUNetv2_plan_and_preprocess", "-d", *numbers, "--no_pp", "-npfp", "1")
    for kind in kinds:
        folder = commands.preprocessed / DATA_SETS[kind].folder
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        plans["configurations"].update(added_configurations(kind, plans["configurations"]))
        (folder / "nnUNetPlans.json").write_text(json.dumps(plans, indent=1))
        folds = folds_of[kind]
        split = [
            {"train": [name for other in folds if other is not fold for name in other], "val": fold} for fold in folds
        ]
        (folder / "splits_final.json").write_text(json.dumps(split))
    configurations = ("2d", "3d_fullres", "3d_lowres")
    commands.must("nnUNetv2_preprocess", "-d", *numbers, "-c", *configurations, "-np", "1", "1", "1")


def added_configurations(kind: str, planned: dict[str, Any]) -> dict[str, Any]:
    """Configurations beside those that nnU-Net planned for data set ``kind``."""
    if kind == "RGB":
        return {}
    two, three = planned["2d"], planned["3d_fullres"]
    if kind == "Small":
        return {
            "2d_batch_1": {"inherits_from": "2d", "batch_size": 1},
            "3d_batch_1": {"inherits_from": "3d_fullres", "batch_size": 1},
            # The lowest resolution of a network with stride 8 is one voxel, and nothing else is in the batch.
            "2d_one_voxel": changed(two, (8, 8), [(1, 1), *[(2, 2)] * 3], batch_size=1),
            "3d_one_voxel": changed(three, (8, 8, 8), [(1, 1, 1), *[(2, 2, 2)] * 3], batch_size=1),
        }
    if kind in LARGE:
        strides = {
            "Thick": [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)],  # in all (4, 32, 32)
            "ThreeSlices": [(1, 1, 1), *[(1, 2, 2)] * 7],  # in all (1, 128, 128)
        }[kind]
        return {"3d_fullres": changed(three, LARGE[kind], strides, batch_size=1)}
    # nnU-Net's add_lowres_and_cascade.py, for images of any size: half the resolution, half the patch.
    lowres = changed(
        three, [math.ceil(size / 2) for size in three["patch_size"]], [(1, 1, 1), (2, 2, 2), (2, 2, 2)], batch_size=2
    )
    lowres["data_identifier"] = "nnUNetPlans_3d_lowres"
    lowres["spacing"] = [2 * size for size in three["spacing"]]
    lowres["median_image_size_in_voxels"] = [size / 2 for size in three["median_image_size_in_voxels"]]
    lowres["next_stage"] = "3d_cascade_fullres"
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    return {"3d_lowres": lowres, "3d_cascade_fullres": cascade}


def changed(
    configuration: dict[str, Any], patch: Sequence[int], strides: Sequence[Sequence[int]], batch_size: int
) -> dict[str, Any]:
    """A copy of a planned configuration with another patch and other strides (one per stage, the first is 1)."""
    new: dict[str, Any] = json.loads(json.dumps(configuration))
    stages, dims = len(strides), len(patch)
    new["patch_size"], new["batch_size"] = list(patch), batch_size
    new["architecture"]["arch_kwargs"].update(
        n_stages=stages,
        features_per_stage=[min(32 * 2**i, 320 if dims == 3 else 512) for i in range(stages)],
        kernel_sizes=[[3] * dims] * stages,
        strides=[list(stride) for stride in strides],
        n_conv_per_stage=[2] * stages,
        n_conv_per_stage_decoder=[2] * (stages - 1),
    )
    return new


def remove_results(commands: Commands, trainer: str) -> None:
    """Delete all that one trainer left in nnUNet_results."""
    for folder in commands.results.glob(f"Dataset*/{trainer}*__*"):
        shutil.rmtree(folder)
