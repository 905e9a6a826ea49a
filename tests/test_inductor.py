"""What nnU-Net compiles by default on GPUs, torch.compile with Inductor and dynamic=False, gives what eager code does.

On a CPU, where Inductor writes C++: with forward and backward pass as one graph each, and the operators as nodes in it.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_lightnets.networks import create_network
from nnunetv2_lightnets.networks.mamba import Mamba
from nnunetv2_lightnets.networks.vss import SS2D
from nnunetv2_lightnets.ops import causal_conv1d, directional_scan, scan_order, selective_scan

pytestmark = [
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:.*CUDA.*"),
]


def _compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="inductor", fullgraph=True, dynamic=False)


def _assert_equal(function: Callable[..., Tensor], arguments: list[Tensor], tolerance: float = 1e-9) -> None:
    """Outputs, gradients, and both again in a second call, which must find what the first has made as it was."""
    leaves = [x.requires_grad_() for x in arguments]
    out = function(*leaves)
    grad = torch.randn_like(out)
    expected = (out, *torch.autograd.grad(out, leaves, grad))
    compiled = _compiled(function)
    for _ in range(2):
        found = compiled(*leaves)
        for x, y in zip((found, *torch.autograd.grad(found, leaves, grad)), expected, strict=True):
            assert x.stride() == y.stride() or x is not found
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * y.abs().max().item())


def _tokens(*shape: int) -> Tensor:
    """Random, in float64, with the last two axes exchanged in memory."""
    return torch.randn(*shape, dtype=torch.float64).mT.contiguous().mT


@pytest.mark.slow
def test_selective_scan() -> None:
    A = -torch.rand(6, 4, dtype=torch.float64)
    arguments = [_tokens(2, 6, 70), _tokens(2, 6, 70), A, _tokens(2, 1, 4, 70), _tokens(2, 1, 4, 70)]
    arguments += [torch.randn(6, dtype=torch.float64), _tokens(2, 6, 70), torch.randn(6, dtype=torch.float64)]
    _assert_equal(lambda u, *others: selective_scan(u.sin(), *others, delta_softplus=True).cos(), arguments)


@pytest.mark.slow
def test_directional_scan() -> None:
    u, A = _tokens(2, 3, 35), -torch.rand(4, 3, 5, dtype=torch.float64)
    arguments = [u, _tokens(2, 4, 3, 35), A, _tokens(2, 4, 5, 35), _tokens(2, 4, 5, 35)]

    def run(u: Tensor, *others: Tensor) -> Tensor:
        return directional_scan(u.sin(), *others, delta_softplus=True, order=scan_order((5, 7))).cos()

    _assert_equal(run, arguments)


def test_causal_convolution() -> None:
    wide = torch.randn(2, 50, 12, dtype=torch.float64)  # what a projection makes, of which the convolution takes half
    weight, bias = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def run(wide: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x, z = wide.sin().chunk(2, dim=-1)
        return causal_conv1d(x.mT, weight, bias, "silu").mT * z

    _assert_equal(run, [wide, weight, bias])


def _assert_trains_the_same(module: nn.Module, x: Tensor, tolerance: float) -> None:
    """Outputs and gradients of all parameters, in float64: where compiled code differs, it is not by rounding."""
    module, x = module.double(), x.double()
    other = copy.deepcopy(module)
    expected, out = module(x), _compiled(other)(x)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    grad = torch.randn_like(expected)
    out.backward(grad)
    expected.backward(grad)
    for (name, parameter), found in zip(module.named_parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None and found.grad is not None, name
        atol = tolerance * max(1, parameter.grad.abs().max().item())
        torch.testing.assert_close(found.grad, parameter.grad, rtol=tolerance, atol=atol, msg=name)


@pytest.mark.slow
def test_mamba_block() -> None:
    _assert_trains_the_same(Mamba(8, d_state=4), torch.randn(2, 70, 8), 1e-9)


@pytest.mark.slow
def test_ss2d_block() -> None:
    _assert_trains_the_same(SS2D(8, d_state=4), torch.randn(2, 5, 7, 8), 1e-9)


@pytest.mark.slow
def test_lightm_unet() -> None:  # in 2D below
    network = create_network(
        "lightm_unet",
        spatial_dims=3,
        input_channels=1,
        num_classes=2,
        width=8,
        blocks_down=(1, 1),
        blocks_up=(1,),
    )
    _assert_trains_the_same(network, torch.randn(2, 1, 16, 16, 16), 1e-7)


@pytest.mark.slow
def test_lightm_unet_with_mixed_precision() -> None:
    """As nnU-Net trains; compiled code keeps more digits between two fused steps than eager code does."""
    settings = {"width": 8, "blocks_down": (1, 1), "blocks_up": (1,)}
    network = create_network("lightm_unet", spatial_dims=2, input_channels=1, num_classes=2, **settings)
    x = torch.randn(2, 1, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, out = network(x), _compiled(copy.deepcopy(network))(x)
    assert out.dtype == expected.dtype
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()
