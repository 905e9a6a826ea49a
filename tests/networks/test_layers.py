"""The layers that several networks share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks.base import values_and_gradients
from torch import nn

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks.layers import (
    BatchNorm,
    PointwiseConv3d,
    channels_last_on_cpu,
    checked_strides,
    max_pool,
    upsample_linear,
    upsample_nearest,
)


def _norm_with_history(channels: int) -> BatchNorm:
    norm = BatchNorm(channels)
    for tensor in (norm.running_mean, norm.bias):
        tensor.data.normal_()
    for tensor in (norm.running_var, norm.weight):
        tensor.data.uniform_(0.5, 2.0)
    return norm


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 3, 4, 3, 2), (2, 3, 1, 1)])
def test_batch_norm_is_torchs_own(shape):
    norm, x = _norm_with_history(3), torch.randn(shape)
    torchs = (torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm3d)(3)
    torchs.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x), torchs(x), rtol=0, atol=0)
    for key, value in torchs.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[key], value, rtol=0, atol=0)
    torch.testing.assert_close(norm.eval()(x), torchs.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3, 1, 1, 1)])
def test_batch_norm_trains_on_one_value_per_channel_with_its_running_statistics(shape):
    norm, x = _norm_with_history(3), torch.randn(shape, requires_grad=True)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    y = norm(x)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(1, 3, *[1] * (x.ndim - 2))
    shift = (norm.bias - norm.running_mean * scale.flatten()).view_as(scale)
    torch.testing.assert_close(y, x * scale + shift)
    y.sum().backward()
    torch.testing.assert_close(x.grad, scale)
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 1, 6, 5), (2, 3, 6, 5), (1, 1, 4, 6, 5), (2, 3, 4, 6, 5)])
def test_channels_last_on_a_cpu_reaches_the_next_convolution(shape):
    x = torch.randn(shape)
    y = channels_last_on_cpu(x)
    torch.testing.assert_close(y, x, rtol=0, atol=0)
    assert y.data_ptr() != x.data_ptr()
    convolve = F.conv2d if x.ndim == 4 else F.conv3d
    out = convolve(y, torch.randn(4, shape[1], *[3] * (x.ndim - 2)), padding=1)
    if x.ndim == 4:  # small volumes go through a torch kernel that knows one format only
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_other_devices_keep_the_memory_format():
    x = torch.empty(1, 3, 4, 4, device="meta")
    assert channels_last_on_cpu(x) is x


def test_pooling_and_upsampling_per_axis():
    x = torch.arange(24.0).view(1, 1, 2, 3, 4)
    pooled = max_pool(x, (1, 3, 2))
    torch.testing.assert_close(pooled, torch.tensor([[9.0, 11.0], [21.0, 23.0]]).view(1, 1, 2, 1, 2))
    assert max_pool(x, (1, 1, 1)) is x
    torch.testing.assert_close(
        upsample_nearest(pooled, (1, 3, 2)), pooled.repeat_interleave(3, 3).repeat_interleave(2, 4)
    )
    # Between the centres 9 and 11 linear interpolation by 2 passes through 9.5 and 10.5, and is flat outside them.
    line = upsample_linear(pooled, (1, 1, 2))[0, 0, 0, 0]
    torch.testing.assert_close(line, torch.tensor([9.0, 9.5, 10.5, 11.0]))
    assert upsample_linear(x, (1, 1, 1)) is x and upsample_nearest(x, (1, 1, 1)) is x


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, "channels_last"])
@pytest.mark.parametrize(
    ("shape", "stride"),
    [((2, 3, 6, 8), (2, 2)), ((1, 2, 7, 9), (2, 3)), ((2, 3, 4, 6, 8), (2, 2, 2)), ((1, 2, 5, 7, 9), (1, 2, 4))],
)
def test_max_pooling_has_torchs_values_and_gradients_and_keeps_a_byte(shape, stride, memory_format):
    if memory_format == "channels_last":
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randint(0, 4, shape).double().contiguous(memory_format=memory_format)  # many are equal
    x[0, 0].flatten()[:3] = torch.nan
    x.requires_grad_()
    pool = F.max_pool2d if len(shape) == 4 else F.max_pool3d
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = max_pool(x, stride)
    expected = pool(x, stride)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert sum(t.untyped_storage().nbytes() for t in kept) == found.numel()
    grad = torch.randn_like(found)
    (ours,), (torchs,) = torch.autograd.grad(found, x, grad), torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(ours, torchs, rtol=0, atol=0)
    assert ours.stride() == x.stride()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_convolution_has_torchs_values_and_gradients(bias, memory_format):
    ours, torchs = PointwiseConv3d(4, 6, 1, bias=bias).double(), nn.Conv3d(4, 6, 1, bias=bias).double()
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 3, 5, 2, dtype=torch.float64).contiguous(memory_format=memory_format)
    found = values_and_gradients(ours, x, list(ours.parameters()))
    expected = values_and_gradients(torchs, x, list(torchs.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("strides", [((2, 2),), ((2, 2), (2, 2, 2)), ((2, 2), (0, 2)), ()])
def test_strides_that_do_not_fit_are_refused(strides):
    with pytest.raises(LightNetsError, match="takes 2 strides of 2 positive integers"):
        checked_strides("net", strides, 2, 2)


def test_strides_from_json_are_taken():
    assert checked_strides("net", [[1, 2], [2, 2]], 2, 2) == ((1, 2), (2, 2))
    assert checked_strides("net", None, 3, 3) == ((2, 2, 2),) * 3
