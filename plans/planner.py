"""``nnUNetv2_lightnets plan``: plans whose patch size, batch size and strides fit one of our networks.

They are derived from the plans that nnU-Net made for the data set: spacing, normalisation and preprocessed data stay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.nnunet.plans import Setting
from nnunetv2_lightnets.nnunet.trainer_names import trainer_names
from nnunetv2_lightnets.trainers import find_trainer

GIGABYTE = 2**30
MEMORY = 8.0  # GB, what nnU-Net plans for
MIN_BATCH = 2
DATASET_SHARE = 0.05  # of all voxels, that a batch may hold at most
_MIN_EDGE = 4  # voxels that nnU-Net leaves of an axis at the coarsest resolution
_LARGEST = {2: 2048**2, 3: 256**3}  # voxels of the first patch that nnU-Net tries
_CLASSES = "nnunetv2_lightnets.plans.networks"


@dataclass(frozen=True)
class Planned:
    """A configuration, planned."""

    configuration: str
    patch: tuple[int, ...]  # voxels along each axis
    batch_size: int
    memory: int  # bytes that a training step takes, estimated


class Planner:
    """Plans for one trainer and one data set.

    Args:
        trainer_class: a trainer of ours.
        base: nnU-Net's plans of the data set.
        dataset_json: the data set's description.
        plans_name: name of the new plans.
        memory: gigabytes that a training step may take; without it, 8, and what the caller fixes goes above it.
        patch: patch size to take as it is, by dimensions.
        batch_size: batch size to take as it is, by dimensions.
        device: where to train, ``cpu`` (float32) or ``cuda`` (mixed precision); it need not be here.
    """

    def __init__(
        self,
        trainer_class: type[Any],
        base: Mapping[str, Any],
        dataset_json: Mapping[str, Any],
        plans_name: str,
        memory: float | None = None,
        patch: Mapping[int, Sequence[int]] | None = None,
        batch_size: Mapping[int, int] | None = None,
        device: str = "cpu",
    ) -> None:
        self.trainer_class = trainer_class
        self.dataset_json = dict(dataset_json)
        self.plans = copy.deepcopy(dict(base))
        self.plans["plans_name"] = plans_name
        self._base = base
        self.limit = None if memory is None else int(memory * GIGABYTE)
        self.patch = dict(patch or {})
        self.batch_size = dict(batch_size or {})
        self.device = device

    def plan(self, configurations: Sequence[str]) -> list[Planned]:
        """Plan these configurations, and those they inherit from or take a previous segmentation from.

        Afterwards ``plans`` has these alone.

        Raises:
            LightNetsError: there is no such configuration, the network does not exist in its dimension, or the memory
                is too small.
        """
        needed = list(dict.fromkeys(name for wanted in configurations for name in self._needed(wanted)))
        for name in needed:
            self.trainer_class._refuse_what_cannot_work(self.plans, name)
        self.plans["configurations"] = {
            name: entry for name, entry in self.plans["configurations"].items() if name in needed
        }
        planned = []
        for name in needed:
            if "inherits_from" not in self._entry(name):
                heirs = [heir for heir in needed if self._inherits(heir, name)]
                planned.append(self._plan_one(name, heirs))
        return planned + [self._inherited(name) for name in needed if "inherits_from" in self._entry(name)]

    def _entry(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = self.plans["configurations"][name]
        return entry

    def _needed(self, name: str) -> Iterator[str]:
        """Configurations without which ``name`` cannot be planned or trained, and itself, last."""
        if name not in self.plans["configurations"]:
            have = ", ".join(self.plans["configurations"])
            raise LightNetsError(f"-c {name} is not in the plans of {self.plans['dataset_name']}, which have: {have}")
        for link in ("inherits_from", "previous_stage"):
            if self._entry(name).get(link):
                yield from self._needed(self._entry(name)[link])
        yield name

    def _inherits(self, heir: str, name: str) -> bool:
        parent = self._entry(heir).get("inherits_from")
        return parent is not None and (parent == name or self._inherits(parent, name))

    def _setting(self, configuration: str) -> Setting:
        return Setting(configuration, self.plans, self.dataset_json, configuration)

    def _plan_one(self, name: str, heirs: Sequence[str]) -> Planned:
        """Plan a configuration, such that those that inherit from it fit in memory, too."""
        # A cascade's network has more input channels; it is the one to be sized.
        sized = next((heir for heir in heirs if self._entry(heir).get("previous_stage")), name)
        dims = len(self._entry(name)["patch_size"])
        limit = self.limit if self.limit is not None else int(MEMORY * GIGABYTE)
        batch_size = self.batch_size.get(dims, MIN_BATCH)
        if dims in self.patch:
            self._set(name, self.patch[dims], self._strides(name, self.patch[dims]), batch_size)
            memory = self._memory(sized, batch_size)
            if memory > limit and self.limit is not None:
                raise self._too_small(f"the patch {_x(self.patch[dims])} with batch size {batch_size}", name, memory)
        else:
            memory = self._largest_patch(name, sized, batch_size, limit)
        if dims not in self.batch_size:
            batch_size, memory = self._largest_batch(name, sized, memory, limit)
        self._entry(name)["batch_size"] = int(batch_size)
        if sized != name:
            memory = self._memory(name, batch_size)
        return Planned(name, tuple(self._entry(name)["patch_size"]), batch_size, memory)

    def _inherited(self, name: str) -> Planned:
        # What a configuration that inherits had of its own would hide what was planned.
        for key in ("patch_size", "batch_size", "architecture"):
            self._entry(name).pop(key, None)
        setting = self._setting(name)
        return Planned(name, setting.patch, setting.batch_size, self._memory(name, setting.batch_size))

    def _largest_patch(self, name: str, sized: str, batch_size: int, limit: int) -> int:
        """Set the largest patch that fits, shaped as nnU-Net shapes it; returns its memory in bytes."""
        median = [float(n) for n in self._entry(name)["median_image_size_in_voxels"]]
        patch, strides = self._fitting(name, self._first_patch(name, median))
        while True:
            self._set(name, patch, strides, batch_size)
            memory = self._memory(sized, batch_size)
            if memory <= limit:
                return memory
            tried = math.prod(patch)
            # Memory grows at most with the voxels: patches that are too large by that measure need no estimate.
            while math.prod(patch) == tried or memory * math.prod(patch) / tried > 1.02 * limit:
                smaller = self._smaller(name, patch, strides, median)
                if smaller is None:
                    if math.prod(patch) == tried:
                        raise self._too_small(f"the smallest patch, {_x(patch)},", name, memory)
                    break
                patch, strides = smaller

    def _first_patch(self, name: str, median: Sequence[float]) -> list[int]:
        """nnU-Net's first patch: as large as its largest, cubic in millimetres, and within the median image."""
        density = [1 / float(spacing) for spacing in self._entry(name)["spacing"]]
        scale = (_LARGEST[len(density)] / math.prod(density)) ** (1 / len(density))
        return [round(min(d * scale, side)) for d, side in zip(density, median, strict=True)]

    def _fitting(self, name: str, patch: Sequence[int]) -> tuple[list[int], list[list[int]] | None]:
        """The patch rounded up to what the network's strides divide, and these strides."""
        strides = self._strides(name, patch)
        divisor = self._divisor(strides, len(patch))
        return [max(d, -(-side // d) * d) for side, d in zip(patch, divisor, strict=True)], strides

    def _strides(self, name: str, patch: Sequence[int]) -> list[list[int]] | None:
        """Strides of each downsampling and axis by nnU-Net's rules; None where the network's are fixed."""
        if self.trainer_class.n_downsamplings is None:
            return None
        from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

        from nnunetv2_lightnets.nnunet.trainer import strides_from_plan

        n = self.trainer_class.n_downsamplings
        spacing = [float(spacing) for spacing in self._entry(name)["spacing"]]
        pooling = get_pool_and_conv_props(spacing, list(patch), _MIN_EDGE, 999999)[1]
        return [[int(s) for s in stride] for stride in strides_from_plan(pooling, n)]

    def _divisor(self, strides: list[list[int]] | None, dims: int) -> tuple[int, ...]:
        from nnunetv2_lightnets.networks.padding import total_stride

        if strides is not None:
            return total_stride(strides)
        return (int(self._network(dims).stride),) * dims

    def _network(self, dims: int) -> Any:
        """The trainer's network, for what it says of itself."""
        from nnunetv2_lightnets.networks import create_network

        name, kwargs = self.trainer_class.network_name, self.trainer_class.network_kwargs
        return create_network(name, spatial_dims=dims, input_channels=1, num_classes=2, **kwargs)

    def _smaller(
        self, name: str, patch: Sequence[int], strides: list[list[int]] | None, median: Sequence[float]
    ) -> tuple[list[int], list[list[int]] | None] | None:
        """The next smaller patch: shorter along the axis that covers most of the median image; None if there is none.

        As in nnU-Net, a shorter axis may be pooled less often, and then takes smaller steps.
        """
        axes = sorted(range(len(patch)), key=lambda axis: patch[axis] / median[axis], reverse=True)
        divisor = self._divisor(strides, len(patch))
        for axis in axes:
            shorter = list(patch)
            shorter[axis] -= divisor[axis]
            if shorter[axis] < 2 * _MIN_EDGE:
                continue
            step = self._divisor(self._strides(name, shorter), len(patch))[axis]
            shorter[axis] = patch[axis] - step
            fitting, new_strides = self._fitting(name, shorter)
            if math.prod(fitting) < math.prod(patch):
                return fitting, new_strides
        return None

    def _largest_batch(self, name: str, sized: str, memory_of_two: int, limit: int) -> tuple[int, int]:
        """The largest batch that fits and holds at most 5 % of the data set, but at least 2, and its memory."""
        most = max(MIN_BATCH, round(self._voxels(name) * DATASET_SHARE / math.prod(self._entry(name)["patch_size"])))
        if most == MIN_BATCH:
            return MIN_BATCH, memory_of_two
        each = self._memory(sized, MIN_BATCH + 1) - memory_of_two
        batch_size = min(most, MIN_BATCH + max(0, (limit - memory_of_two) // max(each, 1)))
        memory = self._memory(sized, batch_size)
        fits, needs = (MIN_BATCH, memory_of_two) if memory > limit else (batch_size, memory)
        # Memory is nearly linear in the batch size: the next guess lies on the line from what fits to what does not.
        while batch_size - fits > 1:
            guess = fits + (limit - needs) * (batch_size - fits) // (memory - needs)
            guess = min(max(guess, fits + 1), batch_size - 1)
            if (guessed := self._memory(sized, guess)) > limit:
                batch_size, memory = guess, guessed
            else:
                fits, needs = guess, guessed
        return fits, needs

    def _voxels(self, name: str) -> float:
        """Voxels of the data set at the configuration's spacing, as nnU-Net counts them."""
        median = [float(n) for n in self._entry(name)["median_image_size_in_voxels"]]
        if len(median) == 2:  # slices come from the volume
            fullres = self._base["configurations"].get("3d_fullres")
            original = self._base["original_median_shape_after_transp"]
            volume = fullres["median_image_size_in_voxels"] if fullres else original
            median = [float(volume[0]), *median]
        return math.prod(median) * int(self.dataset_json["numTraining"])

    def _memory(self, name: str, batch_size: int) -> int:
        import torch

        from nnunetv2_lightnets.nnunet.memory import training_memory

        device = torch.device(self.device)
        return int(training_memory(self.trainer_class, self._setting(name), batch_size, device).total)

    def _set(self, name: str, patch: Sequence[int], strides: list[list[int]] | None, batch_size: int) -> None:
        self._entry(name)["patch_size"] = [int(side) for side in patch]
        self._entry(name)["architecture"] = self._architecture(len(patch), strides)
        self._entry(name)["batch_size"] = int(batch_size)

    def _architecture(self, dims: int, strides: list[list[int]] | None) -> dict[str, Any]:
        """The plans' block that names the network, as nnU-Net builds it."""
        from nnunetv2_lightnets.networks import network_entry
        from nnunetv2_lightnets.nnunet.planned_networks import output_strides

        scales = self._network(dims).deep_supervision_scales if self.trainer_class.deep_supervision else (1.0, 0.5)
        kwargs: dict[str, Any] = {"spatial_dims": dims, "strides": output_strides(scales, dims)}
        if strides is not None:
            kwargs["network_strides"] = strides
        network_class = network_entry(self.trainer_class.network_name).network_class.__name__
        return {
            "network_class_name": f"{_CLASSES}.{network_class}",
            "arch_kwargs": kwargs | copy.deepcopy(dict(self.trainer_class.network_kwargs)),
            "_kw_requires_import": [],
        }

    def _too_small(self, what: str, name: str, memory: int) -> LightNetsError:
        limit = MEMORY if self.limit is None else self.limit / GIGABYTE
        return LightNetsError(
            f"{limit:.3g} GB are too little for {self.trainer_class.__name__} in {name}: {what} takes about "
            f"{memory / GIGABYTE:.2f} GB; give more with --memory, or take a smaller network"
        )


def plans_name(trainer_class: type[Any], suffix: str | None = None) -> str:
    """``nnUNetPlans_<network>``, with the variant's letter where it is not the network's first, and the suffix."""
    network = trainer_class.network_name
    relatives = ((name, find_trainer(name)) for name in trainer_names())
    kwargs_of = {name: t.network_kwargs for name, t in relatives if getattr(t, "network_name", None) == network}
    first = next(iter(kwargs_of), "")
    same = next((name for name, kwargs in kwargs_of.items() if kwargs == trainer_class.network_kwargs), "")
    return "_".join(part for part in ("nnUNetPlans", network, same.removeprefix(first), suffix) if part)


def with_kept_configurations(plans: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """``plans`` with the configurations of an older file that it does not have itself, as nnU-Net keeps them."""
    kept = {k: v for k, v in before.get("configurations", {}).items() if k not in plans["configurations"]}
    return plans | {"configurations": plans["configurations"] | kept}


def _x(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))
