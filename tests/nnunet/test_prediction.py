"""The network that nnU-Net's predictor gets: prepared once for each fold, and never with the weights of another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks.base import as_trained
from torch import nn

from nnunetv2_lightnets import create_network
from nnunetv2_lightnets.nnunet import prediction
from nnunetv2_lightnets.nnunet.prediction import PredictionNetwork

SMALL = {
    "ulite": {"channels": (4, 8, 8, 16)},
    "ultralight_unet": {"variant": "T"},
}


def trained(name: str) -> nn.Module:
    return as_trained(create_network(name, spatial_dims=2, input_channels=2, num_classes=3, **SMALL[name]))


class TestPredictionNetwork:
    """The calls that nnU-Net's predictor makes, in its order."""

    @pytest.mark.parametrize("name", SMALL)
    def test_folds_follow_each_other(self, name):
        folds = [trained(name) for _ in range(2)]
        network = PredictionNetwork(trained(name))
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
        own = trained("ulite").eval()
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


def ulite(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return trained("ulite").eval()


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Networks of which copies were prepared."""
    made: list[nn.Module] = []
    prepare: Callable[[nn.Module], nn.Module] = prediction.prepare_for_inference

    def count(network: nn.Module) -> nn.Module:
        made.append(network)
        return prepare(network)

    monkeypatch.setattr(prediction, "prepare_for_inference", count)
    return made


def test_a_copy_is_prepared_once_for_each_fold_and_not_again_for_each_case(prepared: list[nn.Module]) -> None:
    folds = [ulite(seed) for seed in range(3)]
    states = [fold.state_dict() for fold in folds]
    network = PredictionNetwork(ulite(9))
    network.load_state_dict(states[0])  # as the predictor does before the first case
    network = network.to("cpu").eval()
    assert prepared == []
    for case in range(3):
        x = torch.randn(1, 2, 32, 40)
        for fold, state in zip(folds, states, strict=True):
            network.load_state_dict(state)
            network = network.to("cpu")
            with torch.inference_mode():
                torch.testing.assert_close(network(x), fold(x), rtol=0, atol=1e-4)
        assert len(prepared) == 3, case
    assert torch.equal(network.state_dict()["decoder.seg_layers.0.weight"], states[-1]["decoder.seg_layers.0.weight"])


def test_as_many_folds_as_are_kept_are_prepared_once(
    prepared: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "_KEPT", 2)
    states = [ulite(seed).state_dict() for seed in range(2)]
    network = PredictionNetwork(ulite(9)).eval()
    for _ in range(2):
        for state in states:
            network.load_state_dict(state)
            network(torch.randn(1, 2, 32, 32))
    assert len(prepared) == 2


def test_changed_weights_are_seen(prepared: list[nn.Module]) -> None:
    fold = ulite(1)
    network, x = PredictionNetwork(ulite(2)).eval(), torch.randn(1, 2, 32, 32)
    for _ in range(2):  # the same tensors, changed in place
        network.load_state_dict(fold.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(network(x), fold(x), rtol=0, atol=1e-4)
            for parameter in fold.parameters():
                parameter.mul_(1.1)
    assert len(prepared) == 2


def test_weights_that_come_and_go_are_not_mistaken_for_each_other() -> None:
    """Freed tensors leave their identity to others."""
    network, x = PredictionNetwork(ulite(99)).eval(), torch.randn(1, 2, 32, 32)
    for seed in range(12):
        network.load_state_dict({key: tensor.clone() for key, tensor in ulite(seed).state_dict().items()})
        with torch.no_grad():
            torch.testing.assert_close(network(x), ulite(seed)(x), rtol=0, atol=1e-4)
    assert len(network._kept) == prediction._KEPT


def test_another_dtype_or_device_is_prepared_anew(prepared: list[nn.Module]) -> None:
    fold = ulite(1)
    state = fold.state_dict()
    network = PredictionNetwork(ulite(2)).eval()
    network.load_state_dict(state)
    x = torch.randn(1, 2, 32, 32)
    with torch.no_grad():
        network(x)
        network.to(torch.float64)
        torch.testing.assert_close(network(x.double()), fold.double()(x.double()), rtol=0, atol=1e-6)
    assert len(prepared) == 2


def test_what_is_prepared_in_inference_mode_serves_outside_of_it() -> None:
    network, x = PredictionNetwork(ulite(1)).eval(), torch.randn(1, 2, 32, 32, requires_grad=True)
    with torch.inference_mode():
        network(torch.randn(1, 2, 32, 32))
    network(x).sum().backward()
    assert x.grad is not None


def test_compiled_it_predicts_the_same_for_each_fold() -> None:
    folds = [ulite(seed) for seed in range(2)]
    network = PredictionNetwork(ulite(9)).eval()
    compiled, x = torch.compile(network, backend="aot_eager"), torch.randn(1, 2, 32, 32)
    for fold in [*folds, *folds]:
        compiled._orig_mod.load_state_dict(fold.state_dict())  # as the predictor does
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x), fold(x), rtol=0, atol=1e-4)
