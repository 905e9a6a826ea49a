"""The registry, and that no network in it goes untested."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from torch import nn

from nnunetv2_lightnets import LightNetsError, create_network
from nnunetv2_lightnets.networks import list_networks, network_entry
from nnunetv2_lightnets.networks.registry import register_network


def names_under_test() -> list[str]:
    """The ``name`` of every test class in this folder."""
    classes = [
        node
        for file in Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(file.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test") and node.bases
    ]
    names = [line for node in classes for line in node.body if isinstance(line, ast.Assign)]
    return [ast.literal_eval(line.value) for line in names if ast.unparse(line.targets[0]) == "name"]


def test_every_network_has_the_tests_of_networks() -> None:
    assert sorted(names_under_test()) == list_networks()


def test_no_name_twice() -> None:
    with pytest.raises(ValueError, match="'ulite' is taken by ULite"):
        register_network("ulite", spatial_dims=(2,))(nn.Identity)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(LightNetsError, match="there is no network 'ulight'; did you mean ulite"):
        create_network("ulight", spatial_dims=2, input_channels=1, num_classes=2)
    with pytest.raises(LightNetsError, match=f"did you mean {', '.join(list_networks())}"):
        network_entry("?")


def test_a_missing_argument_is_pythons_own_error() -> None:
    """A caller's mistake, not a user's: whoever asks for a network without a plan can tell by it that one is needed."""
    with pytest.raises(TypeError, match="patch_size"):
        create_network("unetr", spatial_dims=2, input_channels=1, num_classes=2)
