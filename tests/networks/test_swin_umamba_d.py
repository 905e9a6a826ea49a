"""Swin-UMamba† against the authors' own code; what it shares with Swin-UMamba is in test_swin_umamba.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nnunetv2_lightnets.networks.swin_umamba_d import PatchExpand, SwinUMambaD
from nnunetv2_lightnets.pretrained import load_official


@pytest.mark.parametrize(("name", "expand"), [("patch_expand_96", (96, 48, 2)), ("final_expand_96", (96, 96, 4))])
def test_expansion_equals_the_authors(name: str, expand: tuple[int, int, int], golden) -> None:
    case, module = golden(name), PatchExpand(*expand)
    module.load_state_dict(case.state)
    (x,), (expected,) = case.ordered("input", "a"), case.ordered("output", "a")
    with torch.no_grad():
        torch.testing.assert_close(module(x.permute(0, 2, 3, 1)), expected, rtol=0, atol=1e-5)


GOLDEN = {
    "swin_umamba_d_small_1ch": {
        "input_channels": 1,
        "num_classes": 5,
        "features": (16, 32, 64, 128),
        "depths": (1, 1, 1, 1),
    },
    "swin_umamba_d_small_3ch": {
        "input_channels": 3,
        "num_classes": 3,
        "features": (12, 24, 48, 96),
        "depths": (1, 2, 1, 1),
    },
}


@pytest.mark.parametrize("name", GOLDEN)
def test_network_equals_the_authors(name: str, golden) -> None:
    case, network = golden(name), SwinUMambaD(deep_supervision=True, **GOLDEN[name]).eval()
    load_official(network, case.state)
    with torch.no_grad():
        outputs = network(*case.ordered("input", "a"))
    for output, expected in zip(outputs, case.ordered("output", "a"), strict=True):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


def test_network_has_the_authors_gradients(golden) -> None:
    case, network = (
        golden("swin_umamba_d_small_3ch"),
        SwinUMambaD(deep_supervision=True, **GOLDEN["swin_umamba_d_small_3ch"]).eval(),
    )
    load_official(network, case.state)
    (x,) = case.ordered("input", "a")
    x.requires_grad_()
    sum(output.square().sum() for output in network(x)).backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()} | {"@input0": x.grad}
    expected = case.group("grad")
    del expected["@loss"]
    assert set(expected) == set(gradients)
    for key, gradient in expected.items():
        assert float((gradients[key] - gradient).abs().max()) <= 1e-3 * float(gradient.abs().max()), key


def test_starts_as_published() -> None:
    network = SwinUMambaD(input_channels=1, num_classes=2, features=(32, 64, 128, 256), depths=(1, 1, 1, 1))
    for key, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            he = math.sqrt(2 / (1 + 1e-4) / fan_in)
            assert float(module.weight.detach().std()) == pytest.approx(he, rel=6 / math.sqrt(module.weight.numel())), (
                key
            )
            assert (module.bias == 0).all(), key
        if isinstance(module, nn.Linear) and key.startswith("decoder."):  # PyTorch's own default
            assert float(module.weight.detach().abs().max()) <= module.in_features**-0.5, key
