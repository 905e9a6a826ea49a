"""MONAI's networks: the published counts, any patch, gradients everywhere, a clear word without MONAI."""

from __future__ import annotations

import sys

import pytest
import torch

from nnunetv2_lightnets import LightNetsError, create_network

pytest.importorskip("monai")


def build(name, dims, channels=1, classes=2, patch=None):
    kwargs = {"patch_size": patch} if name == "unetr" else {}
    return create_network(name, spatial_dims=dims, input_channels=channels, num_classes=classes, **kwargs)


@pytest.mark.parametrize(
    ("name", "dims", "count"),
    [("segresnet", 3, 18_796_035), ("segresnet", 2, 6_299_106), ("swin_unetr", 2, 25_139_324)],
)
def test_parameters_are_the_published_trainers(name, dims, count):
    network = build(name, dims, 1 if dims == 3 else 3, 3 if dims == 3 else 2)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("name", ["segresnet", "unetr", "swin_unetr"])
def test_any_patch_runs_and_every_parameter_has_a_gradient(name):
    network = build(name, 2, 2, 3, patch=(24, 20))
    logits = network(torch.randn(1, 2, 24, 20))
    assert logits.shape == (1, 3, 24, 20)
    logits.square().sum().backward()
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []
    heads = {key for key, tensor in network.state_dict().items() if ".seg_layers." in key}
    assert {len(network.state_dict()[key]) for key in heads} == {3}
    other = build(name, 2, 2, 5, patch=(24, 20)).state_dict()
    assert {key for key, tensor in network.state_dict().items() if other[key].shape != tensor.shape} == heads


def test_unetr_refuses_what_is_larger_than_its_patch():
    with pytest.raises(LightNetsError, match="built for patches of 32 x 32 voxels"):
        build("unetr", 2, patch=(24, 20))(torch.randn(1, 1, 33, 20))


def test_without_monai_there_is_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(LightNetsError, match=r"pip install 'nnunetv2-lightnets\[baselines\]'"):
        build("segresnet", 2)


@pytest.mark.parametrize(("dims", "patch", "count"), [(3, (128, 128, 128), 93_029_619), (2, (512, 512), 88_317_186)])
def test_unetr_has_the_published_parameters_but_for_norms_that_nobody_uses(dims, patch, count):
    with torch.device("meta"):
        network = build("unetr", dims, 1 if dims == 3 else 3, 3 if dims == 3 else 2, patch=patch)
    assert sum(p.numel() for p in network.parameters()) == count - 12 * 2 * 768  # 12 blocks, scale and offset
