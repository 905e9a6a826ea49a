"""The control: nnU-Net's network, with as many multiply-accumulates as a light one."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_lightnets import LightNetsError
from nnunetv2_lightnets.networks.counting import count_macs
from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.nnunet.trainer_names import TRAINERS
from nnunetv2_lightnets.trainers import find_trainer
from nnunetv2_lightnets.trainers.slim_unet import closest_features, widths

NAMES = [name for name in TRAINERS if "SlimUNet" in name]


def build(trainer, setting, channels=1, classes=3):
    plans = PlansManager(setting.plans)
    configuration = plans.get_configuration(setting.configuration)
    return trainer.build_network_architecture(plans, configuration, channels, classes, True)


def test_widths_are_all_roundings_of_one_factor():
    features = (4, 6, 10)
    expected = []
    for i in range(20001):
        rounded = tuple(max(1, int(i / 20000 * c + 0.5)) for c in features)
        if rounded not in expected:
            expected.append(rounded)
    assert widths(features) == expected
    assert widths(features, 2.0)[-1] == (8, 12, 20)
    assert widths((32, 64, 320, 320))[-1] == (32, 64, 320, 320)


@pytest.mark.parametrize("target", [0, 100, 12_345, 250_000, 333_333, 5_000_000])
def test_the_closest_width_is_found_with_few_counts(target):
    features, counted = (32, 64, 128, 256, 320, 320), []

    def macs(width):
        counted.append(width)
        return 3 * width[0] + sum(a * b for a, b in pairwise(width))

    found = closest_features(features, target, macs)
    calls = len(counted)
    best = min(widths(features, 8.0), key=lambda width: abs(macs(width) - target))
    assert abs(macs(found) - target) == abs(macs(best) - target)
    assert calls <= 20


@pytest.mark.parametrize(
    ("patch", "like"),
    [([16, 16, 16], "UltraLightUNet"), ([32, 48], "ULite")],
)
def test_it_computes_as_much_as_the_light_network(patch, like):
    setting = patch_setting(patch, 1, 3)
    trainer = find_trainer(f"nnUNetTrainerSlimUNet{like}")
    network = build(trainer, setting)
    configuration = PlansManager(setting.plans).get_configuration(setting.configuration)
    light = find_trainer(f"nnUNetTrainer{like}").trained_network(configuration, 1, 3)
    network.decoder.deep_supervision = False
    target = count_macs(light, 1, setting.patch)
    assert count_macs(network, 1, setting.patch) == pytest.approx(target, rel=0.15)
    # One step wider or narrower is not closer.
    features = tuple(network.encoder.output_channels)
    planned = configuration.network_arch_init_kwargs
    steps = widths(planned["features_per_stage"])
    others = [steps[i] for i in (steps.index(features) - 1, steps.index(features) + 1) if 0 <= i < len(steps)]
    for other in others:
        changed = copy.deepcopy(setting.plans)
        changed["configurations"]["free"]["architecture"]["arch_kwargs"]["features_per_stage"] = list(other)
        manager = PlansManager(changed)
        unlike = nnUNetTrainer.build_network_architecture(manager, manager.get_configuration("free"), 1, 3, False)
        distance = abs(count_macs(unlike, 1, setting.patch) - target)
        assert distance >= abs(count_macs(network, 1, setting.patch) - target)


def test_the_default_is_lightm_unet_s_and_the_same_network_each_time():
    trainer = find_trainer("nnUNetTrainerSlimUNet")
    assert trainer.like == "nnUNetTrainerLightMUNetS"
    setting = patch_setting([16, 24], 2, 2)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = build(trainer, setting, 2, 2)
    torch.set_rng_state(state)
    second = build(trainer, setting, 2, 2)
    for (name, a), (other, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert first.decoder.deep_supervision
    assert len(first(torch.randn(1, 2, *setting.patch))) == len(first.decoder.seg_layers)


def test_with_residual_encoder_plans_it_is_that_network():
    setting = patch_setting([16, 16], 1, 2)
    architecture = setting.plans["configurations"]["free"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    kwargs = architecture["arch_kwargs"]
    stages = kwargs["n_stages"]
    kwargs["n_blocks_per_stage"] = [1, 3, 4][:stages]
    kwargs["n_conv_per_stage_decoder"] = [1] * (stages - 1)
    del kwargs["n_conv_per_stage"]
    network = build(find_trainer("nnUNetTrainerSlimUNetLightMUNetT"), setting, 1, 2)
    assert type(network).__name__ == "ResidualEncoderUNet"
    assert network.encoder.output_channels[0] < 32


def test_plans_of_other_networks_are_refused():
    setting = patch_setting([32, 32], 1, 2)
    del setting.plans["configurations"]["free"]["architecture"]["arch_kwargs"]["features_per_stage"]
    with pytest.raises(LightNetsError, match=r"features_per_stage.*-p nnUNetPlans"):
        build(find_trainer("nnUNetTrainerSlimUNet"), setting, 1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_training_is_nnunets_own(name):
    trainer = find_trainer(name)
    assert issubclass(trainer, nnUNetTrainer)
    changed = {key for base in trainer.__mro__[: trainer.__mro__.index(nnUNetTrainer)] for key in vars(base)}
    own = {"build_network_architecture", "on_train_start", "like", "_target"}
    assert {key for key in changed if not key.startswith("__")} - {"_abc_impl"} == own
    assert find_trainer(trainer.like) is not None
