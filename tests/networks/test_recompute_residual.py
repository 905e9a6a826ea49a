"""What is computed again in the backward pass: same gradients, less memory; and the instance norm that goes with it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from networks.base import as_trained, loss, outputs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_lightnets import create_network
from nnunetv2_lightnets.networks import swin_umamba, swin_umamba_d, umamba, vss
from nnunetv2_lightnets.networks.instance_norm import instance_norm
from nnunetv2_lightnets.networks.vss import VSSBlock

SMALL = {
    "swin_umamba": {"features": (8, 16, 32), "depths": (1, 1)},
    "swin_umamba_d": {"features": (16, 32), "depths": (1, 1)},
    "umamba_bot": {"features": (8, 16, 32)},
    "umamba_enc": {"features": (8, 16, 32)},
}
# Bytes kept for the backward pass, relative to a network that computes nothing again.
KEPT = {"swin_umamba": 0.45, "swin_umamba_d": 0.06, "umamba_bot": 0.75, "umamba_enc": 0.85}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return create_network(
        name, spatial_dims=2, input_channels=1, num_classes=2, deep_supervision=True, **SMALL[name]
    ).train()


def step(network: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Gradients of all parameters and of the image."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # stochastic depth
    loss([head.float() for head in outputs(network, x)] if x.dtype == torch.float32 else outputs(network, x)).backward()
    return {"image": x.grad} | {name: p.grad for name, p in network.named_parameters()}


@pytest.fixture
def plain() -> Iterator[mock.Mock]:
    """Calling it makes networks keep all that they compute, until the test ends."""
    patches = [
        mock.patch.object(module, "recomputed", lambda function, *tensors: function(*tensors))
        for module in (vss, swin_umamba, swin_umamba_d, umamba)
    ]
    yield mock.Mock(side_effect=lambda: [patch.start() for patch in patches])
    mock.patch.stopall()


def assert_close(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], error: float) -> None:
    scale = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)
    for name, grad in expected.items():
        if grad is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], grad, rtol=0, atol=error * scale, msg=name)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_those_of_what_is_kept(name: str, dtype: torch.dtype, error: float, plain: mock.Mock) -> None:
    network, x = as_trained(build(name)).to(dtype), torch.randn(2, 1, 32, 32, dtype=dtype)
    other = copy.deepcopy(network)
    found = step(network, x)
    plain()
    assert_close(found, step(other, x), error)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_under_autocast_are_those_of_what_is_kept(name: str, plain: mock.Mock) -> None:
    network, x = build(name), torch.randn(2, 1, 32, 32)
    other = copy.deepcopy(network)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(network, x)
    plain()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(found, step(other, x), 1e-5)


class Kept:
    """A tensor that is kept for the backward pass as long as this object lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(network: nn.Module, x: Tensor) -> int:
    """Bytes that are kept for the backward pass after a forward pass, beside the parameters; each storage once."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(tensor: Tensor) -> Kept:
        kept.add(held := Kept(tensor))
        return held

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
        logits = network(x)
    storages = {s.data_ptr(): s.nbytes() for s in (held.tensor.untyped_storage() for held in kept)}
    del logits
    return sum(size for address, size in storages.items() if address not in own)


@pytest.mark.parametrize("name", SMALL)
def test_little_is_kept(name: str, plain: mock.Mock) -> None:
    network, x = build(name), torch.randn(2, 1, 64, 64)
    kept = kept_bytes(network, x)
    plain()
    everything = kept_bytes(network, x)
    assert kept < KEPT[name] * everything


def test_a_frozen_block_keeps_nothing_and_costs_no_gradient() -> None:
    block, x = VSSBlock(16, drop_path=0.5).train(), torch.randn(2, 6, 5, 16)
    trained = FlopCounterMode(display=False)
    with trained:
        block(x.requires_grad_()).sum().backward()
    block.requires_grad_(False)
    assert kept_bytes(block, x.detach()) == 0
    frozen = FlopCounterMode(display=False)
    with frozen:
        block(x).sum().backward()
    assert frozen.get_total_flops() < 0.8 * trained.get_total_flops()
    assert x.grad.isfinite().all()


def test_a_block_used_twice_sums_its_gradients(plain: mock.Mock) -> None:
    block, x = VSSBlock(8, drop_path=0.5).double().train(), torch.randn(2, 4, 5, 8, dtype=torch.float64)
    twice = nn.Sequential(block, block)
    other = copy.deepcopy(twice)
    found = step(twice, x)
    plain()
    assert_close(found, step(other, x), 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("affine", [False, True])
def test_instance_norm_is_torchs(layout: torch.memory_format, affine: bool) -> None:
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    scale = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)] if affine else [None, None]
    y = instance_norm(x, *scale)
    torch.testing.assert_close(y, F.instance_norm(x, weight=scale[0], bias=scale[1]))
    assert y.is_contiguous(memory_format=layout)
    assert torch.autograd.gradcheck(instance_norm, (x, *scale))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_instance_norm_of_volumes_is_torchs(layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 5, 3, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    torch.testing.assert_close(instance_norm(x), F.instance_norm(x))
    assert torch.autograd.gradcheck(instance_norm, (x,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_instance_norm_of_values_far_from_zero(layout: torch.memory_format) -> None:
    x = (10 + torch.randn(2, 8, 64, 64)).to(memory_format=layout)
    torch.testing.assert_close(instance_norm(x), F.instance_norm(x.double()).float(), rtol=0, atol=5e-4)
