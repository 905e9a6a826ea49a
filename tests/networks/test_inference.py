"""Preparation for prediction: what is merged, and exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from networks.base import as_trained
from torch import nn

from nnunetv2_lightnets import create_network
from nnunetv2_lightnets.networks import prepare_for_inference
from nnunetv2_lightnets.networks.ulite import AxialDepthwise

SMALL = {
    "ulite": {"channels": (4, 8, 8, 16)},
    "ultralight_unet": {"variant": "T"},
}


def trained(name: str, **settings) -> nn.Module:
    return as_trained(create_network(name, spatial_dims=2, input_channels=2, num_classes=3, **SMALL[name] | settings))


@pytest.mark.parametrize("name", SMALL)
def test_no_batch_norm_is_left(name):
    prepared = prepare_for_inference(trained(name))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in prepared.modules())


@pytest.mark.parametrize("name", SMALL)
def test_rewrites_are_exact(name):
    """In float64, where what remains is rounding alone."""
    network = trained(name).eval().double()
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


@pytest.mark.parametrize(
    ("name", "tiny"), [("ulite", {"channels": (4, 8)}), ("ultralight_unet", {"kernel_sizes": (1, 3)})]
)
def test_a_prepared_network_can_be_exported_and_pickled(name, tiny):
    prepared, x = prepare_for_inference(trained(name, **tiny)), torch.randn(1, 2, 40, 36)
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
