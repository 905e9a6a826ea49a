"""U-Lite: parity with the published code, exact sizes, its lift to 3D."""

from __future__ import annotations

import pytest
import torch
from networks.base import NetworkTests
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_lightnets import LightNetsError, create_network
from nnunetv2_lightnets.networks.ulite import ULite
from nnunetv2_lightnets.pretrained import load_official

SMALL = (4, 8, 8, 8, 8, 16)


class TestULite(NetworkTests):
    name = "ulite"
    settings = {"channels": (4, 8, 8, 16)}
    tiny = {"channels": (4, 8)}
    stride = 8
    slow = ()
    cases = [
        ((37, 51), {"strides": ((2, 2), (1, 2), (1, 1))}),
        ((45, 24), {"kernel_size": 3}),
        ((40, 64), {"channels": SMALL, "strides": ((2, 2), (2, 2), (2, 1), (1, 1), (1, 1))}),
        ((9, 24, 31), {"strides": ((1, 2, 2), (2, 2, 2), (2, 2, 1))}),
        ((3, 64, 64), {"channels": SMALL, "strides": ((1, 2, 2),) * 5}),
    ]


def published() -> ULite:
    return ULite(spatial_dims=2, input_channels=3, num_classes=1)


def small(spatial_dims: int = 2, **kwargs) -> ULite:
    kwargs = {"input_channels": 1, "num_classes": 2, "channels": SMALL, **kwargs}
    return ULite(spatial_dims=spatial_dims, **kwargs)


@pytest.mark.parametrize("tag", ["a", "b"])
def test_outputs_are_the_published_ones(golden, tag):
    case, network = golden("ulite"), published()
    load_official(network, case.state)
    with torch.no_grad():
        found = network.eval()(case.ordered("input", tag)[0])
    torch.testing.assert_close(found, case.ordered("output", tag)[0], rtol=0, atol=1e-4)


def test_a_training_step_is_the_published_one(golden):
    """In float64, so that only the published float32 numbers carry rounding noise."""
    case, network = golden("ulite"), published().double()
    load_official(network, case.state)
    step = case.group("grad/@train")
    x = step["input"].double().requires_grad_()
    loss = network.train()(x).square().sum()
    loss.backward()
    torch.testing.assert_close(loss.detach().float(), step["loss"].squeeze(), rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad.float(), step["d_input"], rtol=1e-3, atol=1e-5 * step["d_input"].abs().max())
    published_gradients = {k: v for k, v in case.group("grad").items() if not k.startswith("@")}
    found = {key: parameter.grad for key, parameter in network.named_parameters()}
    expected = network.from_official(published_gradients)
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        if found[key].abs().max() < 1e-9:  # a bias before a norm: zero in theory, noise in float32
            assert gradient.abs().max() < 0.02 and key.endswith("bias")
        else:
            torch.testing.assert_close(
                found[key].float(), gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=key
            )
    state = network.state_dict()
    after = network.from_official(case.group("grad/@train/state_after"))
    assert len(after) == 3 * 11
    for key, value in after.items():
        torch.testing.assert_close(state[key].to(value.dtype), value, rtol=1e-5, atol=1e-6, msg=key)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(golden):
    state = golden("ulite").state
    with pytest.raises(LightNetsError, match="of another shape"):
        load_official(ULite(spatial_dims=2, input_channels=1, num_classes=1), state)
    with pytest.raises(LightNetsError, match=r"missing.*encoder.0.norm"):
        load_official(published(), {k: v for k, v in state.items() if not k.startswith("e1.bn")})
    with pytest.raises(LightNetsError, match=r"unexpected: 1 \(e9\.bn\.weight\)"):
        load_official(published(), {**state, "e9.bn.weight": torch.zeros(3)})


@pytest.mark.parametrize(
    ("spatial_dims", "inputs", "classes", "stem", "count"),
    [
        (2, 3, 1, None, 878_417),
        (2, 3, 2, None, 878_434),
        (2, 3, 4, None, 878_468),
        (2, 1, 1, None, 876_849),
        (2, 1, 2, None, 876_866),
        (2, 1, 4, None, 876_900),
        (3, 1, 1, None, 885_969),
        (3, 1, 2, None, 885_986),
        (3, 3, 1, None, 886_833),
        (3, 4, 4, None, 887_316),
        (3, 1, 1, 7, 891_025),
        (3, 4, 4, 7, 907_540),
    ],
)
def test_parameters(spatial_dims, inputs, classes, stem, count):
    network = ULite(spatial_dims=spatial_dims, input_channels=inputs, num_classes=classes, stem_kernel_size=stem)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize(
    ("shape", "gmacs"),
    [
        ((1, 3, 256, 256), 0.7365),
        ((1, 3, 224, 224), 0.5639),
        ((1, 3, 352, 352), 1.392),
        ((1, 1, 96, 96, 96), 3.830),
        ((1, 3, 96, 96, 96), 4.595),
    ],
)
def test_multiply_accumulates(shape, gmacs):
    with torch.device("meta"):
        network = ULite(spatial_dims=len(shape) - 2, input_channels=shape[1], num_classes=1).eval()
        x = torch.empty(shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.005)


@torch.no_grad()
def test_the_3d_network_is_the_2d_one_on_each_slice_where_it_does_not_look_across_them():
    flat = small(2).eval()
    deep = small(3, stem_kernel_size=7, strides=((1, 2, 2),) * 5).eval()
    for tensor in flat.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.2, 1.0)
    state = deep.state_dict()
    for key, tensor in state.items():
        if ".axes.0." in key:
            tensor.zero_()  # along the slices
            continue
        source = flat.state_dict()[key.replace(".axes.1.", ".axes.0.").replace(".axes.2.", ".axes.1.")]
        if tensor.ndim == 5:
            tensor.zero_()
            tensor[:, :, tensor.shape[2] // 2] = source
        else:
            tensor.copy_(source)
    deep.load_state_dict(state)
    volume = torch.randn(2, 1, 3, 40, 32)
    slices = torch.stack([flat(volume[:, :, z]) for z in range(3)], dim=2)
    torch.testing.assert_close(deep(volume), slices, rtol=1e-4, atol=1e-4 * slices.abs().max().item())


@torch.no_grad()
def test_the_third_axial_kernel_acts_along_the_third_axis():
    axial = small(3).encoder[0].axial
    x = torch.zeros(1, 4, 9, 9, 9)
    x[..., 4, 4, 4] = 1.0
    for axis in axial.axes:
        axis.bias.zero_()
    response = axial(x) - x
    for number, axis in enumerate(axial.axes):
        index = [4, 4, 4]
        index[number] = slice(1, 8)
        line = axis.weight.flatten(1).flip(1).clone()
        line[:, 3] += sum(other.weight.flatten(1)[:, 3] for other in axial.axes if other is not axis)
        torch.testing.assert_close(response[0][(slice(None), *index)], line)
    response[..., 4, 4, :] = response[..., 4, :, 4] = response[..., :, 4, 4] = 0.0
    assert not response.any()


@torch.no_grad()
def test_strides_set_the_size_of_every_stage():
    network = small(3, strides=((1, 2, 2), (2, 2, 2), (2, 1, 2), (1, 1, 2), (1, 2, 1))).eval()
    sizes = []
    for stage in network.encoder:
        stage.register_forward_hook(lambda _, __, out: sizes.append(tuple(out[0].shape[2:])))
    assert network(torch.randn(1, 1, 8, 16, 32)).shape[2:] == (8, 16, 32)
    assert sizes == [(8, 8, 16), (4, 4, 8), (2, 4, 4), (2, 4, 2), (2, 2, 2)]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"channels": (4, 6)}, "the last a multiple of 4"),
        ({"channels": (4,)}, "at least two"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"stem_kernel_size": 2}, "stem_kernel_size must be odd, got 2"),
        ({"strides": ((2, 2),)}, "takes 5 strides"),
    ],
)
def test_settings_that_do_not_fit_are_refused(setting, message):
    with pytest.raises(LightNetsError, match=message):
        create_network("ulite", spatial_dims=2, input_channels=1, num_classes=2, **setting)
