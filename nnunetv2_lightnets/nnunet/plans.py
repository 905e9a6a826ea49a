"""What networks are measured on: a data set's plans, or a free patch with the plans that nnU-Net would make of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import read_json
from nnunetv2_lightnets.nnunet.folders import dataset_folder

PLANS = "nnUNetPlans"  # nnU-Net's default
_FREE = "free"  # configuration of a free patch
_MIN_BATCH = 2  # nnU-Net plans no smaller one
_MIN_FEATURE_MAP = 4  # voxels that nnU-Net leaves of an axis
_BASE_FEATURES, _MAX_FEATURES = 32, {2: 512, 3: 320}  # of nnU-Net's default network


@dataclass(frozen=True)
class Setting:
    """Plans and data set description, as nnU-Net's trainers take them, and the configuration in question."""

    title: str  # what to call it
    plans: dict[str, Any]  # a plans file's content
    dataset_json: dict[str, Any]  # a dataset.json's content
    configuration: str  # of the plans

    @property
    def _planned(self) -> dict[str, Any]:
        """The configuration, with what it inherits from others."""
        planned: dict[str, Any] = self.plans["configurations"][self.configuration]
        while (parent := planned.get("inherits_from")) is not None:
            above = self.plans["configurations"][parent]
            planned = {**above, **planned, "inherits_from": above.get("inherits_from")}
        return planned

    @property
    def patch(self) -> tuple[int, ...]:
        """Patch size in voxels."""
        return tuple(int(n) for n in self._planned["patch_size"])

    @property
    def input_channels(self) -> int:
        """Channels of the input, a cascade's previous segmentation included."""
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        plans = PlansManager(copy.deepcopy(self.plans))
        configuration = plans.get_configuration(self.configuration)
        return int(determine_num_input_channels(plans, configuration, self.dataset_json))

    @property
    def data_identifier(self) -> str:
        """Folder of the preprocessed data."""
        return str(self._planned["data_identifier"])

    @property
    def batch_size(self) -> int:
        """Patches of a training step."""
        return int(self._planned["batch_size"])

    @property
    def volume(self) -> tuple[int, int, int]:
        """Size of the median image, as (slices, height, width)."""
        planned = [round(float(n)) for n in self._planned["median_image_size_in_voxels"]]
        if len(planned) == 3:
            return planned[0], planned[1], planned[2]
        slices = round(float(self.plans["original_median_shape_after_transp"][0]))
        return max(slices, 1), planned[0], planned[1]


def dataset_setting(dataset: str, configuration: str, plans_name: str = PLANS) -> Setting:
    """The setting of a planned data set; it need not be preprocessed.

    Args:
        dataset: ID (``4``) or name (``Dataset004_Hippocampus``).
        configuration: ``2d``, ``3d_fullres``, ...
        plans_name: name of the plans.

    Raises:
        LightNetsError: something of this is not there.
    """
    folder = dataset_folder(dataset)
    remedy = f"plan it with nnUNetv2_plan_experiment -d {dataset}"
    plans = read_json(folder / f"{plans_name}.json", remedy)
    dataset_json = read_json(folder / "dataset.json", remedy)
    if configuration not in plans.get("configurations", {}):
        have = ", ".join(plans.get("configurations", {}))
        raise LightNetsError(f"-c {configuration} is not in {plans_name} of {folder.name}, which have: {have}")
    return Setting(f"{folder.name}, {configuration}, {plans_name}", plans, dataset_json, configuration)


def patch_setting(
    patch: Sequence[int],
    channels: int,
    classes: int,
    *,
    volume: Sequence[int] | None = None,
    batch_size: int = _MIN_BATCH,
) -> Setting:
    """The setting of a free patch: isotropic data, nnU-Net's rules for strides, kernels and features.

    nnU-Net rounds a patch up to what its network's strides divide; the setting has the rounded one.

    Args:
        patch: 2 or 3 numbers of voxels.
        channels: of the input.
        classes: of the output, background included.
        volume: (slices, height, width) of a whole image; default twice the patch along each axis.
        batch_size: patches of a training step.
    """
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    dims = len(patch)
    _, strides, kernels, rounded, _ = get_pool_and_conv_props([1.0] * dims, list(patch), _MIN_FEATURE_MAP, 999999)
    size = [int(n) for n in rounded]
    stages = len(strides)
    whole = [int(n) for n in volume] if volume else [1] * (3 - dims) + [2 * n for n in size]
    planned = {
        "data_identifier": _FREE,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch_size,
        "patch_size": size,
        "median_image_size_in_voxels": whole[-dims:],
        "spacing": [1.0] * dims,
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "batch_dice": dims == 2,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": [min(_BASE_FEATURES * 2**i, _MAX_FEATURES[dims]) for i in range(stages)],
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": [[int(k) for k in kernel] for kernel in kernels],
                "strides": [[int(s) for s in stride] for stride in strides],
                "n_conv_per_stage": [2] * stages,
                "n_conv_per_stage_decoder": [2] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    plans = {
        "dataset_name": "Dataset999_Free",
        "plans_name": PLANS,
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": whole,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "configurations": {_FREE: planned},
    }
    dataset_json = {
        "channel_names": {str(i): f"channel {i}" for i in range(channels)},
        "labels": {"background": 0} | {f"class {i}": i for i in range(1, classes)},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    title = f"patch {' x '.join(map(str, size))}, {_count(channels, 'channel')}, {_count(classes, 'class', 'classes')}"
    return Setting(title, plans, dataset_json, _FREE)


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"
