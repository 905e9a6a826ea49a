"""What nnU-Net's predictor and validation get: a network that computes with a prepared copy of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from nnunetv2_lightnets.networks.inference import prepare_for_inference


class PredictionNetwork(nn.Module):
    """A network as nnU-Net's predictor needs it: it loads a training's state dict and predicts with a prepared copy.

    The predictor builds a network, loads one fold's weights after the other into it, and moves it to a device. After
    each of these the copy is made anew. The state dict is the network's own. The copy gives the finest output alone.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._prepare()

    def _prepare(self) -> None:
        prepared = prepare_for_inference(self.network)
        decoder: Any = prepared.decoder
        decoder.deep_supervision = False
        self._prepared = [prepared]  # in a list, since it is no submodule: its weights are not to be seen from outside

    @property
    def decoder(self) -> nn.Module:
        """The network's own decoder, on which nnU-Net sets ``deep_supervision``."""
        return cast(nn.Module, self.network.decoder)

    def forward(self, x: Tensor) -> Any:
        """Logits (B, classes, *spatial) of the network in evaluation for ``x`` (B, C, *spatial)."""
        return self._prepared[0](x)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own state dict."""
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the network's own state dict."""
        keys = self.network.load_state_dict(state_dict, strict=strict, assign=assign)
        self._prepare()
        return keys

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PredictionNetwork:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._prepare()
        return self
