"""Loading checkpoints in the authors' key names: completely, or not at all."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_lightnets import LightNetsError
from nnunetv2_lightnets.pretrained import load_official


class Small(nn.Module):
    """Names its layers `stem` and `head`; the "authors" call them `conv` and `out`, and carry a dead `aux`."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, classes, 1)

    def from_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {"conv": "stem", "bn": "norm", "out": "head"}
        return {
            f"{names.get(key.split('.')[0], key.split('.')[0])}.{key.split('.', 1)[1]}": tensor
            for key, tensor in state_dict.items()
            if not key.startswith("aux.")
        }


def official(network: Small) -> dict[str, Tensor]:
    names = {"stem": "conv", "norm": "bn", "head": "out"}
    state = {f"{names[k.split('.')[0]]}.{k.split('.', 1)[1]}": v.clone() for k, v in network.state_dict().items()}
    return state | {"aux.weight": torch.zeros(3)}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_loads_every_tensor_whatever_the_packing(prefix: str, wrapped: bool) -> None:
    source, network = Small(), Small()
    assert not same(source, network)
    state = {prefix + key: tensor for key, tensor in official(source).items()}
    load_official(network, {"network_weights": state, "current_epoch": 3} if wrapped else state)
    assert same(source, network)


def refused(network: nn.Module, state: Mapping[str, object]) -> str:
    """The message; the network must be untouched."""
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(LightNetsError) as error:
        load_official(network, state)
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_names_missing_keys() -> None:
    state = official(Small())
    del state["out.weight"], state["conv.bias"]
    assert "missing: 2 (stem.bias, head.weight)" in refused(Small(), state)


def test_names_unexpected_keys_and_counts_the_rest() -> None:
    state = official(Small()) | {f"block.{i}": torch.zeros(1) for i in range(5)}
    assert "unexpected: 5 (block.0, block.1, block.2, ...)" in refused(Small(), state)


def test_names_wrong_shapes_and_loads_nothing() -> None:
    message = refused(Small(classes=5), official(Small(classes=2)))
    assert "head.weight: (2, 4, 1, 1) in the checkpoint, (5, 4, 1, 1) in the network" in message


def test_refuses_values_that_are_no_tensors() -> None:
    assert "not a tensor: 1 (stem.bias)" in refused(Small(), official(Small()) | {"conv.bias": [0.0] * 4})


@pytest.mark.parametrize("state", [{}, {"network_weights": {}}, {"network_weights": None}])
def test_refuses_a_checkpoint_without_weights(state: dict[str, object]) -> None:
    assert "holds no weights" in refused(Small(), state)


def test_a_mapping_that_needs_an_absent_key_is_a_users_error() -> None:
    class Strict(Small):
        def from_official(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {"stem.weight": state_dict["conv1.weight"]}

    assert "lacks 'conv1.weight'" in refused(Strict(), official(Small()))


def test_a_network_without_published_weights_says_so() -> None:
    assert "Linear has no published weights" in refused(nn.Linear(1, 1), {"weight": torch.zeros(1, 1)})


def test_dtype_follows_the_network() -> None:
    source, network = Small(), Small().double()
    load_official(network, official(source))
    assert network.stem.weight.dtype == torch.float64
    assert torch.equal(network.stem.weight.float(), source.stem.weight)
