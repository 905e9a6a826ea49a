"""Ablations: networks without their mechanism: what is left out is gone, what is left is as documented."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_lightnets import create_network
from nnunetv2_lightnets.networks.mamba import Mamba
from nnunetv2_lightnets.networks.vss import SS2D
from nnunetv2_lightnets.nnunet.plans import patch_setting
from nnunetv2_lightnets.trainers import find_trainer

ABLATIONS = {
    "nnUNetTrainerLightMUNetNoScan": "nnUNetTrainerLightMUNet",
    "nnUNetTrainerLightMUNetSNoScan": "nnUNetTrainerLightMUNetS",
    "nnUNetTrainerLightMUNetTNoScan": "nnUNetTrainerLightMUNetT",
    "nnUNetTrainerSwinUMambaScratchNoScan": "nnUNetTrainerSwinUMambaScratch",
    "nnUNetTrainerUltraLightUNetSingleKernel": "nnUNetTrainerUltraLightUNet",
}
OF_THE_SCAN = {"x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log"}


def test_mamba_without_scan_is_the_scan_with_a_state_that_nobody_reads():
    whole, without = Mamba(8), Mamba(8, scan=False)
    assert {key for key in whole.state_dict() if key not in without.state_dict()} == OF_THE_SCAN
    without.load_state_dict({k: v for k, v in whole.state_dict().items() if k not in OF_THE_SCAN})
    with torch.no_grad():
        whole.x_proj.weight[-whole.d_state :] = 0  # C, by which the state is read
        whole.D.uniform_(-1, 1)
        without.D.copy_(whole.D)
    tokens = torch.randn(2, 33, 8)
    torch.testing.assert_close(without(tokens), whole(tokens), rtol=0, atol=1e-6)


def test_a_pixel_sees_its_neighbours_alone_without_the_scan():
    block, x = SS2D(8, scan=False), torch.randn(1, 9, 9, 8, requires_grad=True)
    block(x)[0, 4, 4].sum().backward()
    seen = (x.grad[0].abs().sum(-1) > 0).nonzero()
    assert seen.min(0).values.tolist() == [3, 3]
    assert seen.max(0).values.tolist() == [5, 5]
    z_only = F.silu(block.in_proj(x).chunk(2, -1)[1])
    with torch.no_grad():
        block.Ds.zero_()  # what is left is the norm's offset, gated
    expected = block.out_proj(block.out_norm.bias * z_only)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_trained_as_its_network_and_differs_in_one_setting(name):
    ablation, network = find_trainer(name), find_trainer(ABLATIONS[name])
    differing = {k for k, v in ablation.network_kwargs.items() if network.network_kwargs.get(k) != v}
    assert differing == ({"kernel_sizes"} if "SingleKernel" in name else {"scan"})
    recipe = ("initial_lr", "weight_decay", "optimizer_class", "optimizer_kwargs", "schedule", "clip_norm")
    for key in ("network_name", "n_downsamplings", "deep_supervision", "configure_optimizers", "train_step", *recipe):
        assert getattr(ablation, key) is getattr(network, key)
    setting = patch_setting([32, 32], 1, 2)
    configuration = PlansManager(setting.plans).get_configuration("free")
    with torch.device("meta"):
        built = [trainer.trained_network(configuration, 1, 2) for trainer in (ablation, network)]
    states = [{key: tensor.shape for key, tensor in n.state_dict().items()} for n in built]
    assert set(states[0]) < set(states[1])


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("lightm_unet", {"width": 8, "scan": False, "blocks_down": (1, 1, 1, 1)}),
        ("swin_umamba", {"features": (4, 8, 16, 32, 64), "depths": (1, 1, 1, 1), "scan": False}),
        ("ultralight_unet", {"variant": "T", "kernel_sizes": (5,)}),
    ],
)
def test_every_parameter_has_a_gradient_and_no_scan_runs(name, kwargs):
    supervised = name == "swin_umamba"
    kwargs |= {"drop_path_rate": 0.0} if supervised else {}
    network = create_network(
        name, spatial_dims=2, input_channels=1, num_classes=2, deep_supervision=supervised, **kwargs
    )
    with torch.profiler.profile() as profile:
        out = network(torch.randn(2, 1, 64, 40))
        sum(head.square().sum() for head in (out if supervised else [out])).backward()
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []
    assert [event.key for event in profile.key_averages() if "scan" in event.key or "mamba_layer" in event.key] == []
