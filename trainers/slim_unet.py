"""A control: nnU-Net's own network, made so narrow that it computes as much as a light network.

A light network is worth its design only if it beats nnU-Net's own, given the same number of multiply-accumulates. The
network is the plan's (PlainConvUNet, or ResidualEncoderUNet with its plans), with one factor on the features of all
stages; strides, kernels and blocks stay. Training is nnU-Net's default in all things.

The features are counted when a training starts, and recorded in its plans, which nnU-Net saves beside the results and
in each checkpoint. Prediction, ``--c``, further folds and exported models take what is recorded. In results of older
versions nothing is; there the features are counted again, which gives the same as long as the counter does.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.files import read_json
from nnunetv2_lightnets.networks.counting import count_macs
from nnunetv2_lightnets.nnunet.checkpoints import bare
from nnunetv2_lightnets.nnunet.trainer import LightNetsTrainer

_FEATURES = "features_per_stage"  # nnU-Net's own key
_RECORD = "slim_unet"  # our key of a configuration: {trainer whose MACs are aimed at: features of each stage}


def widths(features: Sequence[int], largest: float = 1.0) -> list[tuple[int, ...]]:
    """All that ``features`` become under one factor from 0 to ``largest``: rounded half up, at least 1; ascending."""
    # A stage of c features gains one at the factors 1.5 / c, 2.5 / c, ...
    steps = {(n + 0.5) / c for c in features for n in range(1, math.floor(largest * c + 0.5))}
    middles = [(a + b) / 2 for a, b in pairwise([0.0, *sorted(steps), largest])]
    return [tuple(max(1, math.floor(factor * c + 0.5)) for c in features) for factor in middles]


def closest_features(features: Sequence[int], target: int, count: Callable[[tuple[int, ...]], int]) -> tuple[int, ...]:
    """The scaled ``features`` whose MACs are closest to ``target``; of two equally close ones the narrower.

    Args:
        features: of each stage, unscaled.
        target: MACs.
        count: MACs of a network with these features; they grow with the factor.
    """
    count = cache(count)
    largest = 1.0
    while count((candidates := widths(features, largest))[-1]) < target:
        largest *= 2
    above = bisect_left(candidates, target, key=count)
    return min(candidates[max(above - 1, 0) : above + 1], key=lambda candidate: abs(count(candidate) - target))


class nnUNetTrainerSlimUNet(nnUNetTrainer):
    """nnU-Net's network with about the MACs of LightM-UNet S."""

    like: ClassVar[str] = "nnUNetTrainerLightMUNetS"  # the trainer whose network's MACs are aimed at

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the plan's network with the features that are recorded, or else as many as the MACs allow."""
        planned = configuration_manager.network_arch_init_kwargs
        if _FEATURES not in planned:
            raise LightNetsError(
                f"{cls.__name__} narrows nnU-Net's network by its {_FEATURES}, which the plans' network "
                f"{configuration_manager.network_arch_class_name} does not state; take nnU-Net's own plans, "
                f"-p nnUNetPlans"
            )

        def build(features: tuple[int, ...], deep_supervision: bool) -> nn.Module:
            network: nn.Module = get_network_from_plans(
                configuration_manager.network_arch_class_name,
                {**planned, _FEATURES: list(features)},
                configuration_manager.network_arch_init_kwargs_req_import,
                num_input_channels,
                num_output_channels,
                allow_init=True,
                deep_supervision=deep_supervision,
            )
            return network

        def macs(features: tuple[int, ...]) -> int:
            # On a device without memory: nothing is allocated, and no random numbers are used up.
            with torch.device("meta"):
                network = build(features, False)
            return count_macs(network, num_input_channels, configuration_manager.patch_size)

        features = configuration_manager.configuration.get(_RECORD, {}).get(cls.like)
        if features is None:
            target = cls._target(configuration_manager, num_input_channels, num_output_channels)
            features = closest_features(planned[_FEATURES], target, macs)
        return build(tuple(features), enable_deep_supervision)

    @classmethod
    def _target(cls, configuration_manager: ConfigurationManager, inputs: int, outputs: int) -> int:
        """MACs of the light network on a patch of the plan."""
        from nnunetv2_lightnets.trainers import find_trainer

        light = find_trainer(cls.like)
        assert light is not None and issubclass(light, LightNetsTrainer)
        with torch.device("meta"):
            network = light.trained_network(configuration_manager, inputs, outputs, False)
        return count_macs(network, inputs, configuration_manager.patch_size)

    def initialize(self) -> None:
        """Build as nnU-Net does, with the features of this model's other folds if there are any, and record them."""
        here = self.configuration_manager.configuration
        saved = Path(self.output_folder_base, "plans.json")
        if self.like not in here.get(_RECORD, {}) and saved.exists():
            there = PlansManager(read_json(saved, "move it away")).get_configuration(self.configuration_name)
            features = there.configuration.pop(_RECORD, {}).get(self.like)
            if there.configuration == {key: value for key, value in here.items() if key != _RECORD}:
                self._record(features)
        super().initialize()
        self._record(self._features())

    def load_checkpoint(self, filename_or_checkpoint: Any = None, checkpoint: Any = None) -> None:
        """Load nnU-Net's checkpoint into a network with the features that it was trained with."""
        source = filename_or_checkpoint if checkpoint is None else checkpoint
        if not self.was_initialized:
            read = source if isinstance(source, dict) else torch.load(source, "cpu", mmap=True, weights_only=False)
            plans = read["init_args"]["plans"]
            self._record(plans["configurations"].get(self.configuration_name, {}).get(_RECORD, {}).get(self.like))
        super().load_checkpoint(source)
        self._record(self._features())

    def _features(self) -> list[int]:
        encoder: Any = bare(self.network).encoder
        return list(encoder.output_channels)

    def _record(self, features: Sequence[int] | None) -> None:
        """Write into the plans, those of the checkpoints included, what features each stage has."""
        if features is not None:
            plans = (self.plans_manager.plans, self.my_init_kwargs["plans"])
            configurations = (p["configurations"][self.configuration_name] for p in plans)
            for configuration in (self.configuration_manager.configuration, *configurations):
                configuration.setdefault(_RECORD, {})[self.like] = list(features)

    def on_train_start(self) -> None:
        """Start as nnU-Net does, and write into the log what is trained."""
        super().on_train_start()
        self.print_to_log_file(f"features {self._features()}, for about the MACs of {self.like}")


def _slim(light: str) -> type[nnUNetTrainerSlimUNet]:
    """The control whose MACs are those of another light network."""
    namespace = {"__module__": __name__, "like": f"nnUNetTrainer{light}"}
    return type(f"nnUNetTrainerSlimUNet{light}", (nnUNetTrainerSlimUNet,), namespace)


nnUNetTrainerSlimUNetLightMUNet = _slim("LightMUNet")
nnUNetTrainerSlimUNetLightMUNetT = _slim("LightMUNetT")
nnUNetTrainerSlimUNetULite = _slim("ULite")
nnUNetTrainerSlimUNetUltraLightUNet = _slim("UltraLightUNet")
