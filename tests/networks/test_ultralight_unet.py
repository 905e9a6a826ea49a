"""UltraLightUNet: parity with the published code, exact sizes, its lift to 3D."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from networks.base import NetworkTests, as_trained
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_lightnets import LightNetsError, create_network
from nnunetv2_lightnets.networks.ultralight_unet import DepthwiseBranch, MultiKernelBlock, UltraLightUNet
from nnunetv2_lightnets.pretrained import load_official

GOLDEN = {"mkunet_T": "T", "mkunet_base": "base", "mkunet_L": "L"}
CHANNELS = {
    "T": (4, 8, 16, 24, 32),
    "S": (8, 16, 32, 48, 80),
    "base": (16, 32, 64, 96, 160),
    "M": (32, 64, 128, 192, 320),
    "L": (64, 128, 256, 384, 512),
}


class TestUltraLightUNet(NetworkTests):
    name = "ultralight_unet"
    settings = {"variant": "T"}
    tiny = {"kernel_sizes": (1, 3)}
    stride = 32
    slow = ("compiles 2D", "compiles 3D")
    cases = [
        ((37, 51), {"strides": ((2, 2), (2, 2), (1, 2), (1, 1), (1, 1))}),
        ((40, 33), {"depths": (1, 2, 1, 3, 1), "gag_kernel": 1}),
        ((32, 32), {"kernel_sizes": (3, 7), "expansion": 3, "gag_kernel": 5}),
        ((32, 32), {"kernel_sizes": (3,), "channels": (2, 4, 6, 8, 9)}),
        ((9, 33, 40), {"strides": ((1, 2, 2), (2, 2, 2), (1, 2, 2), (2, 2, 2), (1, 1, 2))}),
        ((3, 64, 64), {"strides": ((1, 2, 2),) * 5}),
    ]


def published(variant: str) -> UltraLightUNet:
    return UltraLightUNet(spatial_dims=2, input_channels=3, num_classes=1, variant=variant)


def tiny(spatial_dims: int = 2, **settings) -> UltraLightUNet:
    settings = {"input_channels": 1, "num_classes": 2, "variant": "T", **settings}
    return UltraLightUNet(spatial_dims=spatial_dims, **settings)


@pytest.mark.parametrize("tag", ["a", "b"])
@pytest.mark.parametrize("name", GOLDEN)
def test_outputs_are_the_published_ones(golden, name, tag):
    case, network = golden(name), published(GOLDEN[name])
    load_official(network, case.state)
    with torch.no_grad():
        found = network.eval()(case.ordered("input", tag)[0])
    torch.testing.assert_close(found, case.ordered("output", tag)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mkunet_T", "mkunet_base"])
def test_a_training_step_is_the_published_one(golden, name):
    """In float64, so that only the published float32 numbers carry rounding noise."""
    case, network = golden(name), published(GOLDEN[name]).double()
    load_official(network, case.state)
    step = case.group("grad/@train")
    x = step["input"].double().requires_grad_()
    output = network.train()(x)
    loss = output.square().sum()
    loss.backward()
    torch.testing.assert_close(output.detach().float(), step["output"], rtol=0, atol=1e-4)
    torch.testing.assert_close(loss.detach().float(), step["loss"].squeeze(), rtol=1e-4, atol=0)
    torch.testing.assert_close(x.grad.float(), step["d_input"], rtol=1e-3, atol=1e-3 * step["d_input"].abs().max())
    published_gradients = {k: v for k, v in case.group("grad").items() if not k.startswith("@")}
    found = {key: parameter.grad for key, parameter in network.named_parameters()}
    expected = network.from_official(published_gradients)
    assert expected.keys() == found.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in expected.items():
        if found[key].abs().max() < 1e-9 * largest:  # a bias before a norm: zero in theory, noise in float32
            assert gradient.abs().max() < 1e-5 * largest and key.endswith("bias")
        else:
            torch.testing.assert_close(
                found[key].float(), gradient, rtol=2e-3, atol=2e-3 * gradient.abs().max().item(), msg=key
            )
    state = network.state_dict()
    after = network.from_official(case.group("grad/@train/state_after"))
    assert len(after) == 3 * (10 * 5 + 4 * 3)
    for key, value in after.items():
        torch.testing.assert_close(state[key].to(value.dtype), value, rtol=1e-4, atol=1e-5, msg=key)


def test_the_authors_dead_heads_are_left_out_and_nothing_else(golden):
    state = golden("mkunet_T").state
    network = published("T")
    assert sum(v.numel() for k, v in state.items() if k.startswith(("out1.", "out2.", "out3."))) == 31
    assert len(network.from_official(state)) == len(state) - 6
    with pytest.raises(LightNetsError, match=r"unexpected: 1 \(out5\.weight\)"):
        load_official(network, {**state, "out5.weight": torch.zeros(1)})
    with pytest.raises(LightNetsError, match=r"missing: 1 \(decoder\.stages\.0\.attention\.squeeze\.weight\)"):
        load_official(network, {k: v for k, v in state.items() if k != "CA1.fc1.weight"})
    with pytest.raises(LightNetsError, match="of another shape"):
        load_official(published("S"), state)


# Published counts, by variant, input channels and classes; they include three heads that nothing reads.
PARAMETERS_2D = [
    (3, 1, {"T": 27384, "S": 93050, "base": 315566, "M": 1150166, "L": 3758118}),
    (3, 2, {"T": 27420, "S": 93118, "base": 315698, "M": 1150426, "L": 3758634}),
    (3, 4, {"T": 27492, "S": 93254, "base": 315962, "M": 1150946, "L": 3759666}),
    (1, 1, {"T": 27172, "S": 92814, "base": 315282, "M": 1149786, "L": 3757546}),
    (1, 2, {"T": 27208, "S": 92882, "base": 315414, "M": 1150046, "L": 3758062}),
    (1, 4, {"T": 27280, "S": 93018, "base": 315678, "M": 1150566, "L": 3759094}),
]
PARAMETERS_3D = [
    (1, 1, {"T": 61933, "S": 165291, "base": 459415, "M": 1437231, "L": 4301407}),
    (3, 1, {"T": 62617, "S": 165999, "base": 460171, "M": 1438083, "L": 4302451}),
]


@pytest.mark.parametrize(("inputs", "classes", "counts"), PARAMETERS_2D)
def test_parameters_2d(inputs, classes, counts):
    for variant, count in counts.items():
        network = UltraLightUNet(spatial_dims=2, input_channels=inputs, num_classes=classes, variant=variant)
        dead = classes * (sum(CHANNELS[variant][:3]) + 3)
        assert sum(p.numel() for p in network.parameters()) == count - dead


@pytest.mark.parametrize(("inputs", "classes", "counts"), PARAMETERS_3D)
def test_parameters_3d(inputs, classes, counts):
    for variant, count in counts.items():
        network = UltraLightUNet(spatial_dims=3, input_channels=inputs, num_classes=classes, variant=variant)
        assert sum(p.numel() for p in network.parameters()) == count


def multiply_accumulates(variant: str, shape: tuple[int, ...]) -> int:
    """Those that torch counts, and those of the one-voxel kernels, which are multiplications here."""
    network = UltraLightUNet(spatial_dims=len(shape) - 2, input_channels=shape[1], num_classes=1, variant=variant)
    network, x = network.to("meta"), torch.empty(shape, device="meta")
    products = []
    for module in network.modules():
        if isinstance(module, DepthwiseBranch) and module.convolution.weight[0].numel() == 1:
            module.norm.register_forward_hook(lambda _, __, out: products.append(out.numel()))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(x)
    assert len(products) == 10
    return counter.get_total_flops() // 2 + sum(products)


@pytest.mark.parametrize(
    ("shape", "gmacs"),
    [
        ((1, 3, 256, 256), {"T": 0.0497, "S": 0.1044, "base": 0.2780, "M": 0.8844, "L": 3.067}),
        ((1, 3, 224, 224), {"base": 0.2129}),
        ((1, 3, 352, 352), {"L": 5.798}),
        ((1, 1, 96, 96, 96), {"T": 0.801, "S": 1.318, "base": 2.577, "M": 5.990, "L": 16.36}),
    ],
)
def test_multiply_accumulates(shape, gmacs):
    for variant, count in gmacs.items():
        assert multiply_accumulates(variant, shape) / 1e9 == pytest.approx(count, rel=0.005)


def test_shuffling_columns_is_shuffling_channels():
    block = MultiKernelBlock(6, 8, (1, 3), 2, 2)
    assert block.groups == math.gcd(12, 8) == 4
    hidden = torch.randn(2, 12, 5, 5)
    shuffled = hidden.view(2, 4, 3, 5, 5).transpose(1, 2).reshape(2, 12, 5, 5)
    torch.testing.assert_close(F.conv2d(hidden, block.unshuffled_projection()), block.project(shuffled))


def test_a_kernel_of_one_voxel_is_a_convolution_of_each_channel():
    for spatial_dims in (2, 3):
        branch = DepthwiseBranch(5, 1, spatial_dims).eval()
        x = torch.randn(2, 5, *(4, 3, 6)[:spatial_dims])
        torch.testing.assert_close(branch(x), F.relu6(branch.norm(branch.convolution(x))))


@torch.no_grad()
def test_the_3d_network_is_the_2d_one_on_each_slice_where_it_does_not_look_across_them():
    flat = tiny(2, num_classes=3).eval()
    deep = tiny(3, num_classes=3, strides=((1, 2, 2),) * 5).eval()
    as_trained(flat)
    state = deep.state_dict()
    for key, tensor in state.items():
        if tensor.ndim == 5:
            tensor.zero_()
            tensor[:, :, tensor.shape[2] // 2] = flat.state_dict()[key]
        else:
            tensor.copy_(flat.state_dict()[key])
    deep.load_state_dict(state)
    image = torch.randn(2, 1, 40, 64)
    found = deep(image.unsqueeze(2).expand(-1, -1, 3, -1, -1))  # equal slices have equal means and maxima
    expected = flat(image)
    assert expected.std() > 0.01
    for z in range(3):
        torch.testing.assert_close(found[:, :, z], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_strides_set_the_size_of_every_level():
    network = tiny(3, strides=((1, 2, 2), (2, 2, 2), (2, 1, 2), (1, 1, 2), (1, 2, 1))).eval()
    found = []
    for stage in network.encoder:
        stage.register_forward_hook(lambda _, x, __: found.append(tuple(x[0].shape[2:])))
    assert network(torch.randn(1, 1, 8, 16, 32)).shape[2:] == (8, 16, 32)
    assert found == [(8, 16, 32), (8, 8, 16), (4, 4, 8), (2, 4, 4), (2, 4, 2)]


def test_one_channel_is_not_repeated():
    """The published code repeats it to three, and crashes unless the network was built for three."""
    with torch.no_grad():
        single, triple = tiny(input_channels=1).eval(), tiny(input_channels=3).eval()
        assert single.encoder[0][0].expand.in_channels == 1
        x = torch.randn(1, 1, 32, 32)
        assert single(x).shape == triple(x.expand(-1, 3, -1, -1)).shape == (1, 2, 32, 32)


def test_initial_weights_are_drawn_as_published():
    network = UltraLightUNet(spatial_dims=2, input_channels=3, num_classes=9, variant="L")
    for module in (network.encoder[3][0].branches[2].convolution, network.encoder[4][0].expand):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert abs(module.weight.mean().item()) < 0.001
    gate = network.decoder.stages[0].gate
    assert not gate.query.bias.any() and not gate.weigh.bias.any()
    head = network.decoder.seg_layers[0]
    assert head.weight.abs().max() <= 1 / math.sqrt(64) and head.weight.std() > 0.05 and head.bias.any()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"variant": "XL"}, "no variant 'XL'; variants: T, S, base, M, L"),
        ({"channels": (4, 8, 16)}, "takes 5 channel counts"),
        ({"channels": (4, 7, 16, 24, 32)}, "even but for the last"),
        ({"depths": (1, 1, 0, 1, 1)}, "5 positive depths"),
        ({"kernel_sizes": (1, 2)}, "must be odd"),
        ({"kernel_sizes": ()}, "must be odd"),
        ({"gag_kernel": 2}, "gag_kernel=2"),
        ({"expansion": 0}, "expansion must be at least 1"),
        ({"strides": ((2, 2),) * 4}, "takes 5 strides"),
    ],
)
def test_settings_that_do_not_fit_are_refused(setting, message):
    with pytest.raises(LightNetsError, match=message):
        create_network("ultralight_unet", spatial_dims=2, input_channels=1, num_classes=2, **setting)
