"""The blocks that both Swin-UMambas are made of, against the authors' own code and against their definitions."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks.vss import (
    SS2D,
    DropPath,
    PatchEmbed,
    PatchMerging,
    VSSBlock,
    VSSMEncoder,
    check_pyramid,
)

REFERENCE = Path(os.environ.get("LIGHTNETS_REFERENCE", Path(__file__).resolve().parents[3] / "shared" / "reference"))


def run_golden(case, module: nn.Module, to_input=lambda x: x) -> None:
    module.load_state_dict(case.state)
    module.eval()
    (expected,) = case.ordered("output", "a")
    with torch.no_grad():
        (x,) = case.ordered("input", "a")
        torch.testing.assert_close(module(to_input(x)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("ss2d_96", lambda: SS2D(96)),
        ("vssblock_96", lambda: VSSBlock(96)),
        ("patch_merging_96", lambda: PatchMerging(96)),
        ("patch_merging_odd_96", lambda: PatchMerging(96)),
        ("patch_embed_p2_48", lambda: PatchEmbed(48, 96, 2)),
        ("patch_embed_p4_1", lambda: PatchEmbed(1, 96, 4)),
    ],
)
def test_block_equals_the_authors(name: str, make: Callable[[], nn.Module], golden) -> None:
    run_golden(golden(name), make())


def test_ss2d_has_the_authors_gradients(golden) -> None:
    case, module = golden("ss2d_96"), SS2D(96)
    module.load_state_dict(case.state)
    (x,) = case.ordered("input", "a")
    x.requires_grad_()
    module(x).square().sum().backward()
    expected = case.group("grad")
    torch.testing.assert_close(
        x.grad, expected["@input0"], rtol=1e-3, atol=1e-4 * float(expected["@input0"].abs().max())
    )
    for name, parameter in module.named_parameters():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize(
    ("turn", "swap"),
    [
        (lambda image: image.transpose(-3, -2), [1, 0, 3, 2]),  # rows become columns
        (lambda image: image.flip(-3, -2), [2, 3, 0, 1]),  # forward becomes backward
    ],
)
def test_directions_are_rows_columns_and_both_backwards(turn, swap: list[int]) -> None:
    block, turned = SS2D(8), SS2D(8)
    state = block.state_dict()
    for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
        state[name] = torch.randn_like(state[name])
    turned.load_state_dict(state)
    block.load_state_dict(state)
    with torch.no_grad():
        for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
            getattr(turned, name).copy_(state[name][swap])
        turned.conv2d.weight.copy_(turn(state["conv2d.weight"].unsqueeze(-1)).squeeze(-1))
    x = torch.randn(1, 4, 5, 8)
    torch.testing.assert_close(turned(turn(x)), turn(block(x)), rtol=1e-4, atol=1e-5)


def test_large_activations_do_not_overflow_in_half_precision() -> None:
    block = SS2D(8)
    block.Ds.data.fill_(2e5)
    x = torch.randn(1, 6, 5, 8)
    expected = block(x)
    with torch.autocast("cpu", torch.float16):
        y = block(x)
    y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
    assert all(torch.isfinite(parameter.grad).all() for parameter in block.parameters())


def test_the_scan_starts_as_mamba_does() -> None:
    block = SS2D(64, d_state=5)
    steps = F.softplus(block.dt_projs_bias.detach())
    assert 0.99e-3 < float(steps.min()) < 2e-3
    assert 0.05 < float(steps.max()) < 1.01e-1
    assert abs(float(steps.log().mean()) - math.log(1e-2)) < 0.2  # log-uniform
    A = -torch.exp(block.A_logs)
    torch.testing.assert_close(A, -torch.arange(1.0, 6).expand(4 * 128, 5))
    assert (block.Ds == 1).all()
    assert float(block.dt_projs_weight.detach().abs().max()) <= block.dt_rank**-0.5
    assert float(block.x_proj_weight.detach().abs().max()) <= 128**-0.5


def test_the_encoder_starts_as_published() -> None:
    encoder = VSSMEncoder(3, 4, (32, 64), (1, 2))
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear):
            assert abs(float(module.weight.detach().std()) - 0.02) < 0.002, name
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name


def test_stochastic_depth_grows_linearly_over_the_blocks() -> None:
    with torch.device("meta"):
        encoder = VSSMEncoder(3, 4, (96, 192, 384, 768), (2, 2, 9, 2), drop_path_rate=0.2)
    rates = [module.probability for module in encoder.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.2 * i / 14 for i in range(15)])


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    drop = DropPath(0.3)
    x = torch.ones(20_000, 2, 3)
    y = drop(x)
    dropped = y[:, 0, 0] == 0
    assert ((y == 0).all(-1).all(-1) == dropped).all()
    torch.testing.assert_close(y[~dropped], x[~dropped] / 0.7)
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 20_000))
    assert drop.eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_keys_are_those_of_vmambas_checkpoint() -> None:
    file = REFERENCE / "vmamba_tiny_v0_manifest.json"
    if not file.is_file():
        pytest.skip(f"{file} is not at hand (set LIGHTNETS_REFERENCE)")
    tensors = json.loads(file.read_text())["tensors"]
    with torch.device("meta"):
        encoder = VSSMEncoder(3, 4, (96, 192, 384, 768), (2, 2, 9, 2))
    keys, own = encoder.vmamba_keys(), encoder.state_dict()
    assert set(keys) == {key for key in tensors if not key.startswith(("norm.", "head."))}
    assert sorted(keys.values()) == sorted(own)
    for key, name in keys.items():
        assert list(own[name].shape) == tensors[key]["shape"], key


def test_only_the_patch_embedding_is_never_frozen() -> None:
    with torch.device("meta"):
        encoder = VSSMEncoder(3, 4, (96, 192, 384, 768), (2, 2, 9, 2))
    frozen = set(encoder.pretrained_names())
    parameters = dict(encoder.named_parameters())
    assert len(frozen) == 204
    assert sum(parameters[name].numel() for name in frozen) == 22_118_016
    assert all(name.startswith("patch_embed.") for name in set(parameters) - frozen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((8, 16), (1,)), r"channels \(8, 16\) and depths \(1,\)"),
        (((8, 16), (1, 0)), "at least 1"),
        (((8, 24), (1, 1)), r"must double each time, got \(8, 24\)"),
    ],
)
def test_an_encoder_that_cannot_be_built_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(LightNetsError, match=message):
        check_pyramid("swin_umamba", *arguments)
