"""U-Mamba: parity with the published code, its parameter counts, and networks bound to their patch."""

from __future__ import annotations

import pytest
import torch
from networks.base import NetworkTests

from nnunetv2_lightnets import LightNetsError, create_network
from nnunetv2_lightnets.networks.umamba import UMambaBot, UMambaEnc
from nnunetv2_lightnets.pretrained import load_official

SMALL = {"features": (4, 8, 16, 16)}


class UMambaTests(NetworkTests):
    settings = SMALL
    tiny = {"features": (4, 8)}
    scales = (1, 1 / 2, 1 / 4)
    float32_error = 1e-4
    cases = [((5, 20, 18), {"features": (4, 8, 16), "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2))})]


class TestUMambaBot(UMambaTests):
    name = "umamba_bot"
    stride = 8
    slow = ("compiles 2D", "compiles 3D")
    scans = {2: 1, 3: 1}


class TestUMambaEnc(UMambaTests):
    name = "umamba_enc"
    needs_patch_size = True
    slow = ("compiles 2D", "compiles 3D", "exports 3D")
    scans = {2: 1, 3: 2}
    bfloat16_error = 0.25  # where it mixes channels, over few voxels


GOLDEN = ("umamba_bot2d_small", "umamba_bot3d_small", "umamba_enc2d_small", "umamba_enc3d_small")


def settings_of(plan: dict) -> dict:
    """Our settings for what the published code reads from a plan."""
    n_stages = len(plan["conv_kernel_sizes"])
    largest = plan["unet_max_num_features"]
    return {
        "features": [min(plan["UNet_base_num_features"] * 2**stage, largest) for stage in range(n_stages)],
        "kernel_sizes": plan["conv_kernel_sizes"],
        "strides": plan["pool_op_kernel_sizes"],
        "patch_size": plan["patch_size"],
    }


def from_golden(case) -> torch.nn.Module:
    kwargs = case.manifest["kwargs"]
    network = create_network(
        case.manifest["network"],
        spatial_dims=len(kwargs["plan"]["patch_size"]),
        input_channels=kwargs["in_channels"],
        num_classes=kwargs["num_classes"],
        deep_supervision=kwargs["deep_supervision"],
        **settings_of(kwargs["plan"]),
    )
    load_official(network, case.state)
    return network


def small(network_class: type, patch_size: tuple[int, ...] | None = None, **kwargs) -> torch.nn.Module:
    kwargs = {"spatial_dims": 2, "input_channels": 1, "num_classes": 2, "features": (4, 8, 16), **kwargs}
    return network_class(patch_size=patch_size, **kwargs)


@pytest.mark.parametrize("name", GOLDEN)
def test_outputs_are_the_published_ones(golden, name):
    case = golden(name)
    network = from_golden(case).eval()
    assert sum(p.numel() for p in network.parameters()) == case.manifest["n_params"]
    for tag in case.manifest["io"]:
        with torch.no_grad():
            found = network(case.ordered("input", tag)[0])
        expected = case.ordered("output", tag)
        assert len(found) == len(expected)
        for logits, published in zip(found, expected, strict=True):
            torch.testing.assert_close(logits, published, rtol=0, atol=case.manifest["atol"])
        network.decoder.deep_supervision = False
        with torch.no_grad():
            torch.testing.assert_close(network(case.ordered("input", tag)[0]), found[0], rtol=0, atol=0)
        network.decoder.deep_supervision = True


@pytest.mark.parametrize(
    ("name", "tag"), [("umamba_bot3d_small", "b"), ("umamba_enc2d_small", "a"), ("umamba_enc3d_small", "a")]
)
def test_gradients_are_the_published_ones(golden, name, tag):
    case = golden(name)
    network = from_golden(case).train()
    loss = sum(logits.square().sum() for logits in network(case.ordered("input", tag)[0]))
    loss.backward()
    published = case.group("grad")
    expected = network.from_official({k: v for k, v in published.items() if not k.startswith("@")})
    found = {key: parameter.grad for key, parameter in network.named_parameters()}
    assert expected.keys() == found.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for key, gradient in expected.items():
        # Biases before an instance norm: zero in theory and noise in float32, hence the absolute part.
        atol = 2e-3 * gradient.abs().max().item() + 1e-6 * scale
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=atol, msg=key)


HIPPOCAMPUS_3D = {"features": (32, 64, 128, 256), "patch_size": (40, 56, 40)}
LITS_3D = {"features": (32, 64, 128, 256, 320, 320), "patch_size": (128, 128, 128)}
HIPPOCAMPUS_2D = {"features": (32, 64, 128, 256), "patch_size": (56, 40)}
LARGE_2D = {"features": (32, 64, 128, 256, 512, 512, 512, 512), "patch_size": (512, 512)}


@pytest.mark.parametrize(
    ("plan", "inputs", "classes", "bot", "enc"),
    [
        (HIPPOCAMPUS_3D, 1, 3, 7_323_305, 7_255_571),
        (LITS_3D, 1, 3, 42_121_199, 42_751_727),
        (HIPPOCAMPUS_2D, 1, 3, 2_815_081, 2_421_267),
        (LARGE_2D, 1, 3, 64_796_661, 64_013_621),
        (LARGE_2D, 3, 2, 64_795_278, 64_012_238),
    ],
)
def test_parameters_of_real_plans(plan, inputs, classes, bot, enc):
    dims = len(plan["patch_size"])
    for network_class, count in ((UMambaBot, bot), (UMambaEnc, enc)):
        with torch.device("meta"):
            network = network_class(spatial_dims=dims, input_channels=inputs, num_classes=classes, **plan)
        assert sum(p.numel() for p in network.parameters()) == count


def test_kernels_are_those_of_the_plan_at_each_resolution():
    kernels = ((1, 3, 3), (1, 3, 3), (3, 3, 3))
    network = small(UMambaBot, (4, 16, 16), spatial_dims=3, kernel_sizes=kernels)
    sizes = [tuple(stage[0].conv1.kernel_size) for stage in (network.encoder.stem, *network.encoder.stages)]
    assert sizes == [kernels[0], *kernels]
    assert [tuple(stage[0].conv2.kernel_size) for stage in network.decoder.stages] == [kernels[1], kernels[0]]


def test_a_network_bound_to_its_patch_pads_smaller_ones_and_refuses_larger_ones():
    network = small(UMambaEnc, (16, 8)).eval()
    assert network.bound_to == (16, 8)
    x = torch.randn(1, 1, 12, 8)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 4))
    with torch.no_grad():
        torch.testing.assert_close(network(x), network(padded)[:, :, :12], rtol=0, atol=0)
    with pytest.raises(LightNetsError, match=r"built for patches of 16 x 8 voxels.* none of 16 x 12"):
        network(torch.randn(1, 1, 16, 12))


def test_a_network_without_such_layers_is_bound_to_no_patch():
    for network in (small(UMambaBot, (16, 8)), small(UMambaEnc), small(UMambaEnc, (64, 64))):
        assert network.bound_to is None
        assert network.eval()(torch.randn(1, 1, 20, 12)).shape == (1, 2, 20, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": (4,)}, "at least two"),
        ({"strides": ((1, 1), (2, 2))}, "as many kernel_sizes and strides"),
        ({"kernel_sizes": ((3, 3), (2, 2), (3, 3))}, "odd"),
        ({"patch_size": (8, 8, 8)}, "2 positive numbers"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(LightNetsError, match=message):
        small(UMambaEnc, **settings)
