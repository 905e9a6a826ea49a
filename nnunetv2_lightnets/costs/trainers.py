"""The trainers that are measured, ours and nnU-Net's, and what their networks cost by count."""

from __future__ import annotations

import contextlib
from typing import Any

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.nnunet.plans import Setting

BASELINE = "nnUNetTrainer"


def find_trainer_class(name: str) -> type[Any]:
    """A trainer of ours, or any that nnU-Net finds.

    Raises:
        LightNetsError: there is none of this name.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunetv2_lightnets.trainers import find_trainer

    found = find_trainer(name)
    if found is None:
        with contextlib.suppress(RuntimeError):  # nnU-Net's word for "none"
            found = recursive_find_trainer_class_by_name(name)
    if not isinstance(found, type):
        raise LightNetsError(f"there is no trainer {name}; nnUNetv2_lightnets networks lists ours")
    return found


def fitting_trainers(dims: int) -> list[str]:
    """Our trainers whose network exists in this dimension; those that cannot be imported are left to their row."""
    from nnunetv2_lightnets.networks import network_entry
    from nnunetv2_lightnets.nnunet.trainer_names import trainer_names
    from nnunetv2_lightnets.trainers import find_trainer

    fitting = []
    for name in trainer_names():
        network = getattr(find_trainer(name), "network_name", None)
        if network is None or dims in network_entry(network).spatial_dims:
            fitting.append(name)
    return fitting


def trainer_costs(trainer: type[Any], setting: Setting) -> tuple[str, int, int]:
    """Name, parameters and MACs (one patch, one forward pass) of the network that a trainer trains on given plans.

    Raises:
        LightNetsError: the network needs a library that is not installed, or does not exist for these plans.
    """
    import torch
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunetv2_lightnets.networks.counting import count_macs, count_parameters
    from nnunetv2_lightnets.nnunet.trainer import LightNetsTrainer

    plans = PlansManager(setting.plans)
    configuration = plans.get_configuration(setting.configuration)
    channels = setting.input_channels
    classes = plans.get_label_manager(setting.dataset_json).num_segmentation_heads
    ours = issubclass(trainer, LightNetsTrainer)
    with torch.device("meta"):  # shapes are enough to count
        if ours:
            network = trainer.trained_network(configuration, channels, classes, False)
        else:
            network = trainer.build_network_architecture(plans, configuration, channels, classes, False)
    name = trainer.network_name if ours else type(network).__name__
    return name, count_parameters(network), count_macs(network, channels, setting.patch)
