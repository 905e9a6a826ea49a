"""Preparation for prediction: the same numbers, the network untouched, and what nnU-Net's predictor asks of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nnunetv2_lightnets import create_network
from nnunetv2_lightnets.networks import prepare_for_inference
from nnunetv2_lightnets.networks.ulite import AxialDepthwise
from nnunetv2_lightnets.nnunet.prediction import PredictionNetwork

SMALL = {
    "ulite": {"channels": (4, 8, 8, 16)},
    "ultralight_unet": {"variant": "T"},
}


def trained(name: str, spatial_dims: int = 2, **settings) -> nn.Module:
    """A network whose weights and running statistics are far from their initial values."""
    settings = {"input_channels": 2, "num_classes": 3, **SMALL[name], **settings}
    network = create_network(name, spatial_dims=spatial_dims, **settings)
    for key, tensor in network.state_dict().items():
        if key.endswith(("norm.weight", "running_var")):
            tensor.uniform_(0.5, 2.0)
        elif key.endswith(("norm.bias", "running_mean")):
            tensor.normal_()
        elif tensor.is_floating_point():
            tensor.normal_(std=tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.5)
    return network


CASES = [
    ("ulite", (1, 2, 32, 32), {}),
    ("ulite", (2, 2, 37, 51), {"strides": ((2, 2), (1, 2), (1, 1))}),
    ("ulite", (1, 1, 45, 24), {"input_channels": 1, "kernel_size": 3}),
    ("ulite", (1, 2, 9, 24, 31), {"strides": ((1, 2, 2), (2, 2, 2), (2, 2, 1))}),
    ("ultralight_unet", (1, 2, 64, 64), {}),
    ("ultralight_unet", (2, 2, 37, 51), {"strides": ((2, 2), (2, 2), (1, 2), (1, 1), (1, 1))}),
    ("ultralight_unet", (1, 1, 40, 33), {"input_channels": 1, "depths": (1, 2, 1, 1, 2), "gag_kernel": 1}),
    ("ultralight_unet", (1, 2, 32, 32), {"kernel_sizes": (3,), "expansion": 3, "gag_kernel": 5}),
    ("ultralight_unet", (1, 2, 9, 33, 40), {"strides": ((1, 2, 2), (2, 2, 2), (1, 2, 2), (2, 2, 2), (1, 1, 2))}),
]


@pytest.mark.parametrize(("name", "shape", "settings"), CASES)
def test_the_prepared_network_computes_the_same(name, shape, settings):
    network = trained(name, len(shape) - 2, **settings)
    network.train()
    prepared = prepare_for_inference(network)
    x = torch.randn(shape)
    with torch.inference_mode():
        expected = network.eval()(x)
        assert expected.std() > 0.01
        torch.testing.assert_close(prepared(x), expected, rtol=0, atol=1e-4 * max(1.0, expected.abs().max().item()))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in prepared.modules())


@pytest.mark.parametrize("name", SMALL)
def test_rewrites_are_exact(name):
    """In float64, where what remains is rounding alone."""
    network = trained(name, 2).eval().double()
    prepared, x = prepare_for_inference(network), torch.randn(2, 2, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(prepared(x), network(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("spatial_dims", "dilation"), [(2, 1), (2, 3), (3, 1), (3, 2)])
@pytest.mark.parametrize("size", [3, 7])
def test_axial_kernels_merge(spatial_dims, dilation, size):
    axial = AxialDepthwise(3, size, spatial_dims, dilation).double()
    x = torch.randn(2, 3, *(8, 9, 7)[:spatial_dims], dtype=torch.float64)
    with torch.no_grad():
        merged = axial.prepared()
        torch.testing.assert_close(merged(x), axial(x))
    assert isinstance(merged, nn.Conv2d | nn.Conv3d) == (size == 3)


def test_a_kernel_of_seven_is_one_convolution_where_launches_cost_more_than_products():
    with torch.device("meta"):
        axial = AxialDepthwise(3, 7, 2)
        volumetric = AxialDepthwise(3, 7, 3)
    with torch.no_grad():
        assert axial.prepared().weight.shape == (3, 1, 7, 7)
        assert not isinstance(volumetric.prepared(), nn.Conv3d)


@pytest.mark.parametrize("name", SMALL)
def test_the_network_is_left_alone(name):
    network = trained(name, 2).train()
    before, x = copy.deepcopy(network.state_dict()), torch.randn(1, 2, 32, 32)
    prepared = prepare_for_inference(network)
    for tensor in prepared.state_dict().values():
        tensor.zero_()
    prepared(x)
    assert network.training and all(p.requires_grad and p.is_contiguous() for p in network.parameters())
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    network(x).sum().backward()
    assert not prepared.training and not any(p.requires_grad for p in prepared.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_preparing_twice_changes_nothing(name):
    prepared = prepare_for_inference(trained(name, 2))
    again, x = prepare_for_inference(prepared), torch.randn(1, 2, 32, 32)
    assert again is not prepared
    assert torch.equal(again(x), prepared(x))


@pytest.mark.parametrize("name", SMALL)
def test_a_prepared_network_can_be_exported_and_pickled(name):
    prepared, x = prepare_for_inference(trained(name, 2)), torch.randn(1, 2, 40, 36)
    expected = prepared(x)
    torch.testing.assert_close(torch.export.export(prepared, (x,)).module()(x), expected)
    torch.testing.assert_close(copy.deepcopy(prepared)(x), expected)


def test_other_networks_have_their_norms_folded_where_the_order_is_certain():
    block = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    untracked = nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    network = nn.Sequential(block, nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4), untracked)
    for norm in (block[1], block[3]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    prepared, x = prepare_for_inference(network), torch.randn(2, 2, 9, 9)
    torch.testing.assert_close(prepared(x), network.eval()(x), rtol=0, atol=1e-5)
    assert [type(m) for m in prepared[0]] == [nn.Conv2d, nn.Identity, nn.ReLU, nn.BatchNorm2d]
    assert isinstance(prepared[3][1], nn.BatchNorm2d)


class TestPredictionNetwork:
    """The calls that nnU-Net's predictor makes, in its order."""

    @pytest.mark.parametrize("name", SMALL)
    def test_folds_follow_each_other(self, name):
        folds = [trained(name, 2) for _ in range(2)]
        network = PredictionNetwork(trained(name, 2))
        x = torch.randn(1, 2, 32, 40)
        for fold in folds:
            network.load_state_dict(fold.state_dict())
            network = network.to("cpu").eval()
            with torch.inference_mode():
                torch.testing.assert_close(network(x), fold.eval()(x), rtol=0, atol=1e-4)
        for key, tensor in folds[-1].state_dict().items():
            assert torch.equal(network.state_dict()[key], tensor)
        assert network.state_dict().keys() == folds[0].state_dict().keys()

    def test_it_predicts_in_another_dtype_after_a_move(self):
        own = trained("ulite", 2).eval()
        network, x = PredictionNetwork(own).to(torch.float64), torch.randn(1, 2, 24, 24, dtype=torch.float64)
        torch.testing.assert_close(network(x), own(x), rtol=1e-9, atol=1e-9)

    def test_it_gives_one_output_of_a_network_with_several(self):
        class Decoder(nn.Module):
            deep_supervision = True

        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.decoder = Decoder()
                self.conv = nn.Conv2d(1, 1, 1)

            def forward(self, x):
                return [self.conv(x)] if self.decoder.deep_supervision else self.conv(x)

        network = PredictionNetwork(Network())
        assert network.decoder is network.network.decoder
        x = torch.randn(1, 1, 4, 4)
        assert torch.equal(network(x), network.network(x)[0])
        network.decoder.deep_supervision = True  # as nnU-Net does after a validation
        assert isinstance(network(x), torch.Tensor)
