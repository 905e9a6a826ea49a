"""The control: nnU-Net's network, with as many multiply-accumulates as a light one."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_lightnets import LightNetsError
from nnunetv2_lightnets.networks.counting import count_macs
from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.nnunet.trainer_names import TRAINERS
from nnunetv2_lightnets.trainers import find_trainer, slim_unet
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# --- recorded features -----------------------------------------------------------------------------------------------


@pytest.fixture
def results(monkeypatch, tmp_path):
    """nnU-Net's folders, and plans of a free patch in them."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    data = tmp_path / "nnUNet_preprocessed" / "Dataset999_Free" / "free"
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()
    return tmp_path / "nnUNet_results" / "Dataset999_Free"


def make(fold=0, **changes):
    """A trainer on plans as they are before any training."""
    setting = patch_setting([16, 24], 1, 2)
    setting.plans["configurations"]["free"] |= changes
    trainer = find_trainer("nnUNetTrainerSlimUNetULite")
    plans = setting.plans | {"continue_training": False}
    return trainer(plans, "free", fold, setting.dataset_json, torch.device("cpu"))


def counts_no_more(monkeypatch):
    def fail(*_):
        raise AssertionError("counted again")

    monkeypatch.setattr(slim_unet, "count_macs", fail)


def features_of(network):
    return list(network.encoder.output_channels)


def test_what_is_counted_is_in_the_plans_of_checkpoints_and_results(results, monkeypatch):
    trainer = make()
    trainer.initialize()
    features = features_of(trainer.network)
    assert features != trainer.configuration_manager.network_arch_init_kwargs["features_per_stage"]
    record = {"nnUNetTrainerULite": features}
    assert trainer.plans_manager.plans["configurations"]["free"]["slim_unet"] == record  # nnU-Net saves these
    file = str(results / "checkpoint_final.pth")
    trainer.save_checkpoint(file)
    saved = torch.load(file, weights_only=False)["init_args"]["plans"]
    assert saved["configurations"]["free"]["slim_unet"] == record

    # Prediction, as nnU-Net builds it from the plans beside the results, here or where they were exported to.
    counts_no_more(monkeypatch)
    plans = PlansManager(json.loads(json.dumps(saved)))
    network = type(trainer).build_network_architecture(plans, plans.get_configuration("free"), 1, 2, False)
    network.load_state_dict(trainer.network.state_dict())
    # --c starts from plans without a record.
    resumed = make()
    resumed.load_checkpoint(file)
    assert features_of(resumed.network) == features


@pytest.mark.parametrize("keyword", ["filename_or_checkpoint", "checkpoint"])
def test_a_checkpoint_has_its_features_even_if_others_would_be_counted(results, monkeypatch, keyword):
    trainer = make()
    trainer.initialize()
    trainer.save_checkpoint(file := str(results / "checkpoint_latest.pth"))
    monkeypatch.setattr(slim_unet, "closest_features", lambda planned, *_: tuple(planned))  # another counter
    resumed = make()
    resumed.load_checkpoint(**{keyword: file})
    assert features_of(resumed.network) == features_of(trainer.network)


def test_further_folds_have_the_features_of_the_first(results, monkeypatch):
    first = make()
    first.initialize()
    (results / "nnUNetTrainerSlimUNetULite__nnUNetPlans__free" / "plans.json").write_text(
        json.dumps(first.plans_manager.plans)
    )
    monkeypatch.setattr(slim_unet, "closest_features", lambda planned, *_: tuple(planned))
    second, replanned = make(fold=1), make(fold=1, patch_size=[24, 24])
    for trainer in (second, replanned):
        trainer.initialize()
    assert features_of(second.network) == features_of(first.network)
    assert features_of(replanned.network) == [32, 64, 128]  # other plans: counted again


def test_checkpoints_without_a_record_go_on_loading(results):
    trainer = make()
    trainer.initialize()
    trainer.save_checkpoint(file := str(results / "checkpoint_final.pth"))
    old = torch.load(file, weights_only=False)
    del old["init_args"]["plans"]["configurations"]["free"]["slim_unet"]
    torch.save(old, file)
    resumed = make()
    resumed.load_checkpoint(file)
    for key, tensor in trainer.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[key])
    recorded = resumed.my_init_kwargs["plans"]["configurations"]["free"]["slim_unet"]  # from now on
    assert recorded == {"nnUNetTrainerULite": features_of(trainer.network)}


@pytest.mark.parametrize("name", NAMES)
def test_training_is_nnunets_own(name):
    trainer = find_trainer(name)
    assert issubclass(trainer, nnUNetTrainer)
    changed = {key for base in trainer.__mro__[: trainer.__mro__.index(nnUNetTrainer)] for key in vars(base)}
    own = {"build_network_architecture", "on_train_start", "like", "_target"}
    own |= {"initialize", "load_checkpoint", "_features", "_record"}  # what is recorded
    assert {key for key in changed if not key.startswith("__")} - {"_abc_impl"} == own
    assert find_trainer(trainer.like) is not None
