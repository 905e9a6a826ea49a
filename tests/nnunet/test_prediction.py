"""What nnU-Net's predictor asks of a network that is prepared for prediction."""

from __future__ import annotations

import pytest
import torch
from networks.base import as_trained
from torch import nn

from nnunetv2_lightnets import create_network
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
