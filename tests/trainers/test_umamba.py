"""U-Mamba's trainers: the network comes from nnU-Net's plans."""

from __future__ import annotations

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_lightnets import LightNetsError
from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.trainers import find_trainer


@pytest.mark.parametrize(("name", "count"), [("UMambaBot", 7_323_305), ("UMambaEnc", 7_255_571)])
def test_the_network_is_the_plans(name, count):
    setting = patch_setting([40, 56, 40], 1, 3)
    plans = PlansManager(setting.plans)
    trainer = find_trainer(f"nnUNetTrainer{name}")
    network = trainer.build_network_architecture(plans, plans.get_configuration(setting.configuration), 1, 3, True)
    assert sum(p.numel() for p in network.parameters()) == count
    assert network.decoder.deep_supervision
    arguments = setting.plans["configurations"][setting.configuration]["architecture"]["arch_kwargs"]
    arguments.pop("kernel_sizes")
    plans = PlansManager(setting.plans)
    with pytest.raises(LightNetsError, match=r"builds its network from kernel_sizes.*-p nnUNetPlans"):
        trainer.build_network_architecture(plans, plans.get_configuration(setting.configuration), 1, 3, True)
