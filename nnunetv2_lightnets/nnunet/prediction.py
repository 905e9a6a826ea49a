"""What nnU-Net's predictor and validation get: a network that computes with a prepared copy of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from nnunetv2_lightnets.networks.inference import prepare_for_inference

_KEPT = 8  # prepared copies; nnU-Net predicts with five folds


class PredictionNetwork(nn.Module):
    """A network as nnU-Net's predictor needs it: it loads a training's state dict and predicts with a prepared copy.

    For every case, nnU-Net's predictor loads one fold's weights after the other and moves the network to its device. A
    copy is prepared at the first forward pass with these weights on this device, and kept for the next case. The state
    dict is the network's own. The copy gives the finest output alone.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        # In lists, since they are no submodules: their weights are not to be seen from outside.
        self._prepared: list[nn.Module] = []  # of the weights that are loaded: none yet, or one
        self._kept: dict[Any, tuple[list[Tensor], list[nn.Module]]] = {}

    @property
    def decoder(self) -> nn.Module:
        """The network's own decoder, on which nnU-Net sets ``deep_supervision``."""
        return cast(nn.Module, self.network.decoder)

    def forward(self, x: Tensor) -> Any:
        """Logits (B, classes, *spatial) of the network in evaluation for ``x`` (B, C, *spatial)."""
        if not self._prepared:
            self._prepare()
        return self._prepared[0](x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _prepare(self) -> None:
        with torch.inference_mode(False):  # the predictor is in it, but the copy may be used outside
            prepared = prepare_for_inference(self.network)
        decoder: Any = prepared.decoder
        decoder.deep_supervision = False
        self._prepared.append(prepared)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own state dict."""
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the network's own state dict; the same tensors, unchanged, bring back the copy prepared of them."""
        keys = self.network.load_state_dict(state_dict, strict=strict, assign=assign)
        self._prepared = []
        tensors = list(state_dict.values())
        if not any(tensor.is_inference() for tensor in tensors):  # such tensors do not count their changes
            key = tuple((id(tensor), tensor._version) for tensor in tensors)
            if key not in self._kept and len(self._kept) == _KEPT:
                del self._kept[next(iter(self._kept))]
            # The tensors are kept, too: no other may take the identity of one.
            _, self._prepared = self._kept.setdefault(key, (tensors, self._prepared))
        return keys

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PredictionNetwork:
        before = self._places()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._places() != before:  # what is merged depends on the device
            for _, prepared in self._kept.values():
                prepared.clear()
            self._prepared.clear()
        return self

    def _places(self) -> list[Any]:
        return [(t.data_ptr(), t.device, t.dtype) for t in self.network.state_dict().values()]
