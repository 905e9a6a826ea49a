"""Depthwise convolutions have torch's values and gradients."""

from __future__ import annotations

import pytest
import torch
from networks.base import values_and_gradients
from torch import nn

from nnunetv2_lightnets.networks.depthwise import AxialDepthwiseConv, depthwise_convolution
from nnunetv2_lightnets.networks.ulite import AxialDepthwise


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("shape", [(1, 4, 5, 6, 7), (3, 2, 4, 1, 9), (2, 1, 3, 8, 4)])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_depthwise_convolution_has_torchs_values_and_gradients(shape, size, memory_format):
    channels = shape[1]
    convolution = nn.Conv3d(channels, channels, size, padding=size // 2, groups=channels, bias=False).double()
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=memory_format)
    parameters = list(convolution.parameters())
    found = values_and_gradients(lambda z: depthwise_convolution(z, convolution), x, parameters)
    expected = values_and_gradients(convolution, x, parameters)
    for ours, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_a_volume_smaller_than_the_depthwise_kernel_has_a_gradient_in_bfloat16():
    """Torch's own is not what it should be: part of it is whatever was in memory."""
    convolution = nn.Conv3d(128, 128, 3, padding=1, groups=128, bias=False)
    x = torch.randn(1, 128, 2, 2, 2).to(memory_format=torch.channels_last_3d)
    exact = torch.autograd.grad(convolution(x).square().sum(), convolution.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_convolution(x, convolution)
    (found,) = torch.autograd.grad(y.float().square().sum(), convolution.weight)
    assert (found - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 4, 5, 6, 7), (3, 2, 4, 1, 9), (2, 1, 3, 8, 4)])
def test_axial_depthwise_convolution_has_torchs_values_and_gradients(shape, axis, dilation, memory_format):
    kernel, padding = [1, 1, 1], [0, 0, 0]
    kernel[axis], padding[axis] = 7, 3 * dilation
    settings = {"padding": padding, "dilation": dilation, "groups": shape[1]}
    line = AxialDepthwiseConv(shape[1], shape[1], kernel, **settings).double()
    torchs = nn.Conv3d(shape[1], shape[1], kernel, **settings).double()
    torchs.load_state_dict(line.state_dict())
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=memory_format)
    found = values_and_gradients(line, x, list(line.parameters()))
    expected = values_and_gradients(torchs, x, list(torchs.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.inference_mode():
        torch.testing.assert_close(line(x), torchs(x))


def test_axial_depthwise_convolution_makes_no_copy_of_a_channels_last_volume():
    line = AxialDepthwiseConv(3, 3, (1, 7, 1), padding=(0, 3, 0), groups=3)
    x = torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    with torch.profiler.profile() as profile:
        y = line(x)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert "aten::copy_" not in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("frozen", ["nothing", "weight", "bias", "0.weight"])
@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 9, 5), (2, 3, 4, 9, 5)])
def test_a_sum_of_axes_has_the_gradients_of_its_convolutions(shape, unread, frozen):
    axial = AxialDepthwise(shape[1], 7, len(shape) - 2).double()
    for name, parameter in axial.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    parameters = [parameter for parameter in axial.parameters() if parameter.requires_grad]
    x = torch.randn(shape, dtype=torch.float64)
    value, *found = values_and_gradients(lambda z: axial(z, unread), x, parameters)
    expected_value, *expected = values_and_gradients(lambda z: z + sum(axis(z) for axis in axial.axes), x, parameters)
    if not unread:
        torch.testing.assert_close(value, expected_value)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
