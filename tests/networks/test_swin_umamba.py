"""Swin-UMamba and what it has in common with Swin-UMamba†: parity, switches, costs."""

from __future__ import annotations

import copy
import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks.base import NetworkTests
from torch import Tensor, nn

from nnunetv2_lightnets import create_network
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks.swin_umamba import ResidualBlock, SwinUMamba, UpBlock
from nnunetv2_lightnets.networks.vss import DropPath
from nnunetv2_lightnets.ops import available_backends
from nnunetv2_lightnets.pretrained import load_official

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = Path(os.environ.get("LIGHTNETS_REFERENCE", ROOT.parent / "shared" / "reference"))
SMALL: dict[str, dict[str, Any]] = {
    "swin_umamba": {"features": (4, 8, 16, 32, 64), "depths": (1, 1, 1, 1), "d_state": 4},
    "swin_umamba_d": {"features": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "d_state": 4},
}
NAMES = list(SMALL)
TWO_STAGES: dict[str, Any] = {"features": (48, 96, 192), "depths": (1, 1)}


class SwinTests(NetworkTests):
    stride = 32
    float32_error = 1e-4
    cases = [((side, other), {}) for side, other in ((33, 34), (66, 66), (48, 80), (32, 160))]


class TestSwinUMamba(SwinTests):
    name = "swin_umamba"
    settings = SMALL["swin_umamba"]
    slow = ("compiles 2D",)  # its blocks are those of the one below
    tiny = {"features": (4, 8, 16), "depths": (1, 1), "drop_path_rate": 0.0}  # two resolutions
    scales = (1, 1 / 2, 1 / 4, 1 / 8)
    scans = {2: 2}


class TestSwinUMambaD(SwinTests):
    name = "swin_umamba_d"
    settings = SMALL["swin_umamba_d"]
    tiny = {"features": (8, 16), "depths": (1, 1), "drop_path_rate": 0.0}
    scales = (1, 1 / 4, 1 / 8, 1 / 16)
    scans = {2: 4}


def small(name: str, input_channels: int = 1, num_classes: int = 2, **settings: Any) -> nn.Module:
    settings = SMALL[name] | settings
    return create_network(name, spatial_dims=2, input_channels=input_channels, num_classes=num_classes, **settings)


def full_size(name: str, input_channels: int, num_classes: int, **settings: Any) -> nn.Module:
    with torch.device("meta"):
        return create_network(name, spatial_dims=2, input_channels=input_channels, num_classes=num_classes, **settings)


def reference(file: str) -> Any:
    if not (REFERENCE / file).is_file():
        pytest.skip(f"{file} is not in {REFERENCE} (set LIGHTNETS_REFERENCE)")
    return json.loads((REFERENCE / file).read_text())


# Parity with the authors' code


def residual_names(prefix: str, own: str = "") -> dict[str, str]:
    own_names = {"conv1": "conv1", "conv2": "conv2", "conv3": "shortcut"}
    return {f"{prefix}.{theirs}.conv.weight": f"{own}{ours}.weight" for theirs, ours in own_names.items()}


@pytest.mark.parametrize(
    ("name", "make", "names"),
    [
        ("unetr_basic_1_48", lambda: ResidualBlock(1, 48), residual_names("layer")),
        ("unetr_basic_48_48", lambda: ResidualBlock(48, 48), residual_names("layer")),
        (
            "unetr_up_96_48",
            lambda: UpBlock(96, 48),
            {"transp_conv.conv.weight": "upsample.weight"} | residual_names("conv_block", "block."),
        ),
        (
            "unet_out_48",
            lambda: SwinUMamba(input_channels=1, num_classes=5, **TWO_STAGES).decoder.seg_layers[0],
            {"conv.conv.weight": "weight", "conv.conv.bias": "bias"},
        ),
        (
            "stem_1",
            lambda: SwinUMamba(input_channels=1, num_classes=2, **TWO_STAGES).stem,
            {key: key for key in ("0.weight", "0.bias", "1.weight", "1.bias")},
        ),
    ],
)
def test_block_equals_the_authors(name: str, make: Callable[[], nn.Module], names: dict[str, str], golden) -> None:
    case = golden(name)
    block = make()
    block.load_state_dict({names[key]: tensor for key, tensor in case.state.items()})
    (expected,) = case.ordered("output", "a")
    with torch.no_grad():
        torch.testing.assert_close(block.eval()(*case.ordered("input", "a")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [4, 6])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_residual_block_leaves_its_input_alone_and_has_exact_gradients(channels: int, channels_last: bool) -> None:
    block = ResidualBlock(channels, 6).double()
    x = torch.randn(2, channels, 3, 4, dtype=torch.float64, requires_grad=True)
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    before = x.detach().clone()
    block(x)
    assert torch.equal(x.detach(), before)
    torch.autograd.gradcheck(block, (x,))


def test_network_equals_the_authors(golden) -> None:
    case = golden("swin_umamba_small_3ch")
    network = SwinUMamba(
        input_channels=3, num_classes=3, deep_supervision=True, features=(6, 12, 24, 48, 96), depths=(1, 2, 1, 1)
    ).eval()
    load_official(network, case.state)
    outputs = network(*case.ordered("input", "a"))
    for output, expected in zip(outputs, case.ordered("output", "a"), strict=True):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


def check_gradients(network: nn.Module, case, zero: set[str]) -> None:
    """Gradients within 1e-3 of the authors', of their largest value; those of ``zero`` are rounding noise."""
    (x,) = case.ordered("input", "a")
    x.requires_grad_()
    loss = sum(output.square().sum() for output in network.eval()(x))
    loss.backward()
    expected = case.group("grad")
    torch.testing.assert_close(loss.detach().view(1), expected.pop("@loss"), rtol=1e-4, atol=0)
    own = network.from_official({key: value for key, value in expected.items() if not key.startswith("@")})
    own["@input0"] = expected["@input0"]
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()} | {"@input0": x.grad}
    assert set(own) == set(gradients)
    largest = max(float(gradient.abs().max()) for gradient in own.values())
    for name, gradient in own.items():
        allowed = 1e-5 * largest if name in zero else 1e-3 * float(gradient.abs().max())
        assert float((gradients[name] - gradient).abs().max()) <= allowed, name


def test_network_has_the_authors_gradients(golden) -> None:
    case = golden("swin_umamba_small_3ch")
    network = SwinUMamba(
        input_channels=3, num_classes=3, deep_supervision=True, features=(6, 12, 24, 48, 96), depths=(1, 2, 1, 1)
    )
    load_official(network, case.state)
    check_gradients(network, case, zero={"stem.0.bias"})  # an instance norm follows


@pytest.mark.parametrize(
    ("case", "name", "channels", "classes"),
    [
        ("SwinUMamba_in1_out14", "swin_umamba", 1, 14),
        ("SwinUMamba_in3_out8", "swin_umamba", 3, 8),
        ("SwinUMambaD_in1_out14", "swin_umamba_d", 1, 14),
        ("SwinUMambaD_in3_out3", "swin_umamba_d", 3, 3),
    ],
)
def test_the_authors_keys_and_shapes_are_ours(case: str, name: str, channels: int, classes: int) -> None:
    shapes = reference("full_size_keys.json")[case]
    network = full_size(name, channels, classes)
    with torch.device("meta"):
        theirs = network.from_official({key: torch.empty(shape) for key, shape in shapes.items()})
    assert len(theirs) == len(shapes)
    assert {key: value.shape for key, value in theirs.items()} == {
        key: value.shape for key, value in network.state_dict().items()
    }


def hashed(index: np.ndarray) -> np.ndarray:
    """Uniform noise in -1..1 from integers, by the same rule as in the reference file."""
    x = index.astype(np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return 2 * x.astype(np.float64) / 2**32 - 1


def hash_state(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """The weights of the reference file's full-size cases, rule "hash"."""
    state = {}
    for k, (key, shape) in enumerate(sorted(shapes.items())):
        u = hashed(np.arange(np.prod(shape), dtype=np.uint32) + np.uint32(1000003 * k % 2**32)).reshape(shape)
        last = key.rpartition(".")[2]
        if last == "A_logs":
            value = np.log(np.arange(1, shape[1] + 1)) + 0.1 * u
        elif last == "Ds":
            value = 1 + 0.1 * u
        elif last == "dt_projs_bias":
            value = -4 + u
        elif len(shape) == 1:
            value = (1 if key.endswith("weight") else 0) + 0.1 * u
        else:
            fan = shape[-1] if len(shape) == 3 else np.prod(shape) / shape[0]
            value = np.sqrt(3 / fan) * u
        state[key] = torch.from_numpy(value.astype(np.float32))
    return state


@pytest.mark.parametrize(
    ("case", "keys", "name"),
    [
        ("swin_umamba_in1_out14_64x64_hash", "SwinUMamba_in1_out14", "swin_umamba"),
        ("swin_umamba_in3_out3_64x96_hash", "SwinUMamba_in3_out3", "swin_umamba"),
        ("swin_umamba_d_in1_out14_64x64_hash", "SwinUMambaD_in1_out14", "swin_umamba_d"),
        ("swin_umamba_d_in3_out3_64x96_hash", "SwinUMambaD_in3_out3", "swin_umamba_d"),
    ],
)
def test_the_full_size_network_equals_the_authors(case: str, keys: str, name: str) -> None:
    expected = reference("swin_umamba_full_size.json")["cases"][case]
    shapes = reference("full_size_keys.json")[keys]
    network = full_size(name, expected["in_chans"], expected["out_chans"], deep_supervision=True)
    network.to_empty(device="cpu").eval()
    load_official(network, hash_state(shapes))
    x = torch.sin(0.1 * torch.arange(np.prod(expected["input"]), dtype=torch.float64)).float()
    with torch.no_grad():
        outputs = network(x.view(expected["input"]))
    for output, head in zip(outputs, expected["heads"], strict=True):
        assert list(output.shape) == head["shape"]
        values = output.flatten()
        for part, known in ((values[:64], head["first64"]), (values[-64:], head["last64"])):
            torch.testing.assert_close(part, torch.tensor(known), rtol=0, atol=1e-4)
        assert float(values.std()) == pytest.approx(head["std"], rel=1e-3)
        assert float(values.abs().max()) == pytest.approx(head["absmax"], abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(name: str) -> None:
    network = small(name)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(LightNetsError, match="missing"):
        load_official(network, {"stem.0.bias": torch.zeros(4)})
    assert all((tensor == before[key]).all() for key, tensor in network.state_dict().items())


# Costs

PARAMETERS = {  # (input channels, classes): Swin-UMamba, Swin-UMamba†
    (1, 14): (59_889_368, 27_497_720),
    (1, 8): (59_885_024, 27_493_088),
    (1, 3): (59_881_404, 27_489_228),
    (3, 14): (59_895_032, 27_500_792),
    (3, 8): (59_890_688, 27_496_160),
    (3, 3): (59_887_068, 27_492_300),
}
FIRST_VERSION = {(1, 14): 40_425_176, (3, 8): 40_426_496, (3, 3): 40_422_876}


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("channels", PARAMETERS)
def test_parameter_counts_are_the_published_codes(channels: tuple[int, int]) -> None:
    assert tuple(count(full_size(name, *channels)) for name in NAMES) == PARAMETERS[channels]
    if channels in FIRST_VERSION:
        first = full_size("swin_umamba", *channels, bottleneck_decoder=False)
        assert count(first) == FIRST_VERSION[channels]


PUBLISHED_GMACS = {  # scan 9LDN, scan vmamba, without scan; None: not measured
    ("Swin-UMamba", "AbdomenMRI"): (67.998, 65.619, 64.078),
    ("Swin-UMamba", "Endoscopy"): (163.587, 157.877, 154.179),
    ("Swin-UMamba", "Microscopy"): (174.374, 168.284, 164.339),
    ("Swin-UMamba, first version", "AbdomenMRI"): (60.797, 58.418, None),
    ("Swin-UMamba, first version", "Endoscopy"): (146.306, 140.597, None),
    ("Swin-UMamba, first version", "Microscopy"): (155.942, 149.852, None),
    ("Swin-UMamba†", "AbdomenMRI"): (18.914, 15.021, 12.499),
    ("Swin-UMamba†", "Endoscopy"): (45.283, 35.940, 29.889),
    ("Swin-UMamba†", "Microscopy"): (48.162, 38.197, 31.741),
}


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "swin_umamba_counts.py"))


@pytest.mark.parametrize(("network", "image"), PUBLISHED_GMACS)
def test_macs_are_those_of_the_papers_under_their_ways_of_counting(network: str, image: str, counts) -> None:
    _, computed, published = counts["network_counts"](network, image)
    for scan, expected in zip(("9LDN", "vmamba", "none"), PUBLISHED_GMACS[network, image], strict=True):
        if expected is not None:
            assert published.total(scan) / 1e9 == pytest.approx(expected, abs=0.0015), scan
    # Ours: two MACs for each token, channel and state, one for each token and channel, and no norms.
    assert computed.scan_ours == 2 * computed.scan_states + computed.scan_channels
    assert computed.total("ours") == computed.total("none") - computed.norms + computed.scan_ours


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize("name", NAMES)
def test_forward_on_a_cpu_is_15_times_as_fast_as_with_the_published_scan(name: str) -> None:
    if (reason := available_backends()["native"]) is not None:
        pytest.skip(reason)
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "swin_umamba_forward.py"))
    times = benchmark["forward_seconds"](name, 320, 3)
    assert times["published"] / times["native, prepared"] >= 15, times


# Switches


def test_the_first_versions_last_stage_is_without_effect_and_fixed() -> None:
    network = small("swin_umamba", bottleneck_decoder=False).eval()
    unused = ("vssm_encoder.layers.3.", "vssm_encoder.downsamples.2.")
    x = torch.randn(1, 1, 64, 32)
    before = network(x)
    before.sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad != name.startswith(unused), name
        if name.startswith(unused):
            parameter.data.normal_()
    assert (network(x) == before).all()


@pytest.mark.parametrize("name", NAMES)
def test_stochastic_depth_is_off_in_evaluation(name: str) -> None:
    network = small(name, drop_path_rate=0.9)
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert not torch.equal(network(x), network(x))
        network.eval()
        assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("name", NAMES)
def test_channels_that_do_not_double_are_refused(name: str) -> None:
    with pytest.raises(LightNetsError, match="must double"):
        small(name, features=(8, 12, 20, 40) if name == "swin_umamba_d" else (4, 8, 12, 20, 40))


# Pretraining


@pytest.mark.parametrize(("name", "loaded"), [("swin_umamba", 204), ("swin_umamba_d", 208)])
def test_the_encoder_starts_from_vmamba(name: str, loaded: int) -> None:
    tensors = reference("vmamba_tiny_v0_manifest.json")["tensors"]
    network = full_size(name, 3, 2)
    keys, own = network.vmamba_keys(), network.state_dict()
    assert len(keys) == loaded
    for key, target in keys.items():
        assert list(own[target].shape) == tensors[key]["shape"], key
        if target != "vssm_encoder.patch_embed.norm.bias":
            field = {"swin_umamba": "SwinUMamba", "swin_umamba_d": "SwinUMambaD_in_chans_3"}[name]
            assert tensors[key][field] == [target]
    encoder = {key: tensor.numel() for key, tensor in own.items() if key.startswith("vssm_encoder.")}
    assert sum(encoder[target] for target in keys.values()) / sum(encoder.values()) > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_at_first(name: str) -> None:
    network = full_size(name, 1, 2)
    frozen = set(network.frozen_parameters())
    parameters = dict(network.named_parameters())
    assert sum(parameters[key].numel() for key in frozen) == 22_118_016
    assert len(frozen) == 204
    rest = {key for key in parameters if key.startswith("vssm_encoder.")} - frozen
    assert rest == {
        f"vssm_encoder.patch_embed.{key}" for key in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_of_the_published_networks_has_their_stochastic_depth(name: str) -> None:
    rates = [m.probability for m in full_size(name, 1, 2).decoder.modules() if isinstance(m, DropPath)]
    expected = {"swin_umamba": [], "swin_umamba_d": [0.2, 0.16, 0.12, 0.08, 0.04, 0.0]}[name]
    assert rates == pytest.approx(expected)
