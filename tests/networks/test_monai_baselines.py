"""MONAI's networks: the published counts, networks bound to their patch, a clear word without MONAI."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks.base import NetworkTests

from nnunetv2_lightnets import LightNetsError, create_network
from nnunetv2_lightnets.networks import monai_baselines

pytest.importorskip("monai")


class MonaiTests(NetworkTests):
    """Our networks have the papers' widths alone; here MONAI is asked for narrower ones in their place."""

    narrow: dict[str, Any]
    slow = ("compiles 2D", "compiles 3D", "exports 2D", "exports 3D")
    float32_error = 1e-4

    @pytest.fixture(autouse=True)
    def _narrow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def narrow(name: str) -> Callable[..., torch.nn.Module]:
            return lambda *args, **settings: published(name)(*args, **(settings | self.narrow))

        published = monai_baselines._monai
        monkeypatch.setattr(monai_baselines, "_monai", narrow)


class TestSegResNet(MonaiTests):
    name = "segresnet"
    narrow = {"init_filters": 8, "blocks_down": (1, 1, 1, 1)}
    stride = 8


class TestUNETR(MonaiTests):
    name = "unetr"
    narrow = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2}
    needs_patch_size = True
    dims = (2,)  # as below: its 12 transformer blocks are the same in 3D


class TestSwinUNETR(MonaiTests):
    name = "swin_unetr"
    narrow = {"feature_size": 12, "depths": (1, 1, 1, 1)}
    dims = (2,)  # a pass in 3D takes a second: of its windows, not of the width
    compiled = False  # MONAI checks the size with numpy


def build(name, dims, channels=1, classes=2, patch=None):
    kwargs = {"patch_size": patch} if name == "unetr" else {}
    return create_network(name, spatial_dims=dims, input_channels=channels, num_classes=classes, **kwargs)


@pytest.mark.parametrize(
    ("name", "dims", "count"),
    [("segresnet", 3, 18_796_035), ("segresnet", 2, 6_299_106), ("swin_unetr", 2, 25_139_324)],
)
def test_parameters_are_the_published_trainers(name, dims, count):
    with torch.device("meta"):
        network = build(name, dims, 1 if dims == 3 else 3, 3 if dims == 3 else 2)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize(("dims", "patch", "count"), [(3, (128, 128, 128), 93_029_619), (2, (512, 512), 88_317_186)])
def test_unetr_has_the_published_parameters_but_for_norms_that_nobody_uses(dims, patch, count):
    with torch.device("meta"):
        network = build("unetr", dims, 1 if dims == 3 else 3, 3 if dims == 3 else 2, patch=patch)
    assert sum(p.numel() for p in network.parameters()) == count - 12 * 2 * 768  # 12 blocks, scale and offset


@pytest.mark.parametrize("name", ["unetr", "swin_unetr"])
def test_volumes_of_any_size(name):
    with torch.device("meta"), torch.no_grad():
        assert build(name, 3, patch=(8, 9, 40))(torch.empty(1, 1, 8, 9, 40)).shape == (1, 2, 8, 9, 40)


def test_unetr_refuses_what_is_larger_than_its_patch():
    with torch.device("meta"):
        network, x = build("unetr", 2, patch=(24, 20)), torch.empty(1, 1, 33, 20)
    with pytest.raises(LightNetsError, match="unetr was built for patches of 32 x 32 voxels"):
        network(x)


def test_without_monai_there_is_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(LightNetsError, match=r"pip install 'monai>=1.5'"):
        build("segresnet", 2)
