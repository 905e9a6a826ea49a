"""LightM-UNet: parity with the published code, exact sizes, prediction in blocks."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from networks.base import NetworkTests
from published_scan import use_published_scan
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_lightnets import LightNetsError, create_network
from nnunetv2_lightnets.networks import lightm_unet
from nnunetv2_lightnets.networks.lightm_unet import LightMUNet, MambaLayer, TokenGroupNorm
from nnunetv2_lightnets.ops import available_backends, token_moments
from nnunetv2_lightnets.ops.flops import register_flop_formulas
from nnunetv2_lightnets.ops.mamba_layer import native
from nnunetv2_lightnets.pretrained import load_official


class TestLightMUNet(NetworkTests):
    name = "lightm_unet"
    settings = {"width": 8, "blocks_down": (1, 1, 1, 1)}
    tiny = {"blocks_down": (1, 1), "blocks_up": (1,)}
    stride = 8
    scans = {2: 5, 3: 5}
    float32_error = 1e-4
    bfloat16_error = 0.2  # at width 8 the first norms have one channel per group
    cases = [
        ((67, 33), {"blocks_up": (1, 2, 1)}),
        ((3, 64, 48), {"strides": ((1, 2, 2), (1, 2, 2), (1, 2, 2))}),
        ((5, 20, 18), {"strides": ((1, 2, 2), (2, 2, 2), (2, 2, 2))}),
    ]


def build(spatial_dims: int = 2, **kwargs) -> LightMUNet:
    """The smallest one, unless told otherwise."""
    kwargs = {"input_channels": 1, "num_classes": 2, "width": 8, "blocks_down": (1, 1, 1, 1), **kwargs}
    return LightMUNet(spatial_dims=spatial_dims, **kwargs)


def from_golden(case) -> LightMUNet:
    network = create_network("lightm_unet", **case.manifest["kwargs"])
    load_official(network, case.state)
    return network


def as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and norms are computed for all tokens at once."""
    monkeypatch.setattr(MambaLayer, "forward", MambaLayer.plain)
    monkeypatch.setattr(lightm_unet, "computes_in_blocks", lambda tokens: False)


# ---- The published code ----


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("lightm2d_w16_in1_out2", "a"),
        ("lightm2d_w16_in1_out2", "b"),
        ("lightm3d_w8_in1_out3", "a"),
        ("lightm3d_official32_in1_out3", "a"),
    ],
)
def test_outputs_are_the_published_ones(golden, name, tag):
    case = golden(name)
    network = from_golden(case).eval()
    x, expected = case.ordered("input", tag)[0], case.ordered("output", tag)[0]
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(network.train()(x).detach(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "tag"), [("lightm2d_w16_in1_out2", "b"), ("lightm3d_w8_in1_out3", "a")])
def test_gradients_are_the_published_ones(golden, name, tag):
    case = golden(name)
    network, x = from_golden(case).train(), case.ordered("input", tag)[0].requires_grad_()
    loss = network(x).square().sum()
    loss.backward()
    published = case.group("grad")
    torch.testing.assert_close(loss.detach(), published["@loss"].squeeze(), rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad, published["@input"], rtol=0, atol=1e-3 * published["@input"].abs().max().item())
    expected = network.from_official({k: v for k, v in published.items() if not k.startswith("@")})
    found = {key: parameter.grad for key, parameter in network.named_parameters()}
    assert expected.keys() == found.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for key, gradient in expected.items():
        # Zero in theory, if followed by group norm with one channel per group, and noise in float32: the absolute part.
        atol = 1e-3 * gradient.abs().max().item() + 1e-7 * scale
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=atol, msg=key)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(golden):
    case = golden("lightm3d_w8_in1_out3")
    with pytest.raises(LightNetsError, match="of another shape"):
        load_official(build(3, width=16, num_classes=3, blocks_down=(1, 2, 2, 4)), case.state)
    partial = {k: v for k, v in case.state.items() if k != "conv_final.2.1.conv.weight"}
    with pytest.raises(LightNetsError, match=r"missing: 1 \(decoder.seg_layers.0.weight\)"):
        load_official(build(3, num_classes=3, blocks_down=(1, 2, 2, 4)), partial)


@pytest.mark.parametrize(
    ("spatial_dims", "inputs", "classes", "width", "count"),
    [
        *((2, 1, 2, 32, 5_011_683), (2, 1, 3, 32, 5_011_716), (2, 3, 2, 32, 5_011_765), (2, 3, 3, 32, 5_011_798)),
        *((3, 1, 2, 32, 5_015_733), (3, 1, 3, 32, 5_015_766), (3, 3, 2, 32, 5_015_851), (3, 3, 3, 32, 5_015_884)),
        *((2, 1, 2, 8, 380_787), (3, 1, 2, 8, 381_813), (2, 1, 2, 16, 1_342_915), (3, 1, 2, 16, 1_344_949)),
        *((2, 1, 2, 24, 2_886_707), (3, 1, 2, 24, 2_889_749)),
    ],
)
def test_parameters(spatial_dims, inputs, classes, width, count):
    with torch.device("meta"):
        network = LightMUNet(spatial_dims, inputs, classes, width=width)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize(
    ("spatial_dims", "inputs", "classes", "patch", "macs", "by_thop"),
    [(3, 1, 3, 128, 175_231_729_664, 177.19), (2, 3, 2, 512, 52_035_321_856, 52.60)],
)
def test_multiply_accumulates(spatial_dims, inputs, classes, patch, macs, by_thop):
    """Ours are those of matrix products, convolutions and the scan; thop's rules count some more and leave some out."""
    with torch.device("meta"):
        network, x = LightMUNet(spatial_dims, inputs, classes), torch.empty(1, inputs, *[patch] * spatial_dims)
    register_flop_formulas()
    counter, norms, skips = FlopCounterMode(display=False), [], []
    for module in network.modules():
        if isinstance(module, MambaLayer):
            module.register_forward_hook(lambda module, inputs, out: norms.extend(2 * [inputs[0].numel()]))
            module.register_forward_hook(lambda module, inputs, out: skips.append(2 * inputs[0].numel()))
    with torch.no_grad(), counter:
        network(x)
    assert counter.get_total_flops() == 2 * macs
    assert len(norms) == 2 * len(skips) == 42
    by_its_rules = macs + 4 * sum(norms)  # 4 per value of a layer norm
    by_its_rules -= sum(skips)  # the reference leaves out the scan's D
    by_its_rules += 32 * patch**spatial_dims  # the depthwise 1x1 convolution, which is folded into the head here
    if spatial_dims == 2:  # 11 per value of a bilinear upsampling, none of a trilinear one
        by_its_rules += 11 * sum(32 * 2**stage * (patch // 2**stage) ** 2 for stage in range(3))
    assert by_its_rules / 1e9 == pytest.approx(by_thop, abs=0.006)


# ---- Strides and settings ----


def test_strides_set_the_grids_of_all_stages():
    network, grids = build(3, strides=((1, 2, 2), (2, 2, 2), (2, 1, 2))), []
    network.encoder.register_forward_hook(lambda module, inputs, out: grids.extend(spatial for _, spatial in out))
    network(torch.randn(1, 1, 4, 8, 16))
    assert grids == [(4, 8, 16), (4, 4, 8), (2, 2, 4), (1, 2, 2)]


def test_strides_change_no_parameter():
    anisotropic = build(3, strides=((1, 2, 2), (2, 2, 2), (2, 2, 2)))
    anisotropic.load_state_dict(build(3).state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 12}, "multiple of 8"),
        ({"width": 0}, "multiple of 8"),
        ({"blocks_up": (1, 1)}, "one entry less in blocks_up"),
        ({"blocks_down": (1,), "blocks_up": ()}, "at least one"),
        ({"strides": ((2, 2), (2, 2))}, "3 strides of 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(LightNetsError, match=message):
        build(2, **settings)


def test_gradients_reach_every_parameter():
    network = build(2, input_channels=3, num_classes=4, blocks_up=(1, 2, 1))
    network(torch.randn(2, 3, 24, 16)).square().mean().backward()
    without = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("grad", [False, True])
def test_it_runs_on_a_device_without_autocast(grad):
    """As meta is, where trainers count; without a counter's fake tensors."""
    with torch.device("meta"), torch.set_grad_enabled(grad):
        network = create_network("lightm_unet", spatial_dims=3, input_channels=1, num_classes=2, width=8)
        assert network(torch.empty(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)


def test_gradients_are_those_of_the_function():
    network, x = build(2, blocks_down=(1, 1), blocks_up=(1,)).double(), torch.randn(2, 1, 8, 6, dtype=torch.float64)
    parameters = dict(network.named_parameters())
    chosen = ["stem.pointwise.weight", "encoder.stages.0.0.norm2.weight", "encoder.transitions.0.skip_scale"]
    chosen += ["decoder.stages.0.blocks.0.norm1.bias", "decoder.scale", "decoder.offset", "decoder.seg_layers.0.bias"]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(network, dict(zip(chosen, values, strict=True)), (x,))

    arguments = [x, *(parameters[key].detach().clone() for key in chosen)]
    assert torch.autograd.gradcheck(run, [a.requires_grad_() for a in arguments], fast_mode=True)


def test_prediction_compiles_into_one_graph():
    network, x = build(2, blocks_down=(1, 1), blocks_up=(1,)), torch.randn(1, 1, 16, 20)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), network(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.2), (torch.float16, 0.03)])
@pytest.mark.parametrize("training", [True, False])
def test_mixed_precision_is_finite_and_as_close_as_its_digits_allow(dtype, error, training):
    """bfloat16 has 8 bits, float16 has 11; at width 8 the first norms have one channel per group, which adds to it."""
    network, x = build(3).train(training), torch.randn(1, 1, 16, 16, 16)
    with torch.set_grad_enabled(training):
        full = network(x)
        with torch.autocast("cpu", dtype):
            found = network(x)
    assert torch.isfinite(found).all()
    assert (found.float() - full).abs().mean() < error * full.abs().mean()
    if training:
        found.float().square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in network.parameters())


# ---- Prediction in blocks, norms ----


@pytest.mark.parametrize("tokens_per_block", [32, 100, 999])
def test_prediction_in_blocks_is_prediction_as_a_whole(monkeypatch, tokens_per_block):
    network, x = build(2, blocks_down=(1, 2, 1, 1)).double().eval(), torch.randn(2, 1, 40, 56, dtype=torch.float64)
    with monkeypatch.context() as patch, torch.no_grad():
        as_a_whole(patch)
        whole = network(x)

    monkeypatch.setattr(native, "takes", lambda layer: False)
    monkeypatch.setitem(token_moments.NUMBERS, "cpu", 1)
    monkeypatch.setattr(token_moments, "FEWEST", tokens_per_block)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(network(x), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("activation", [False, True])
def test_a_layer_is_its_plain_steps(activation):
    """Outputs and gradients, under autocast up to rounding."""
    layer, norm = MambaLayer(16, 32).double(), TokenGroupNorm(16).double() if activation else None
    tokens = torch.randn(2, 70, 16, dtype=torch.float64, requires_grad=True)
    leaves = [tokens, *layer.parameters(), *(() if norm is None else norm.parameters())]
    outputs = layer(tokens, norm), layer.plain(tokens, norm)
    grad = torch.randn_like(outputs[0])
    found, expected = (torch.autograd.grad(out, leaves, grad) for out in outputs)
    for x, y in zip((outputs[0], *found), (outputs[1], *expected), strict=True):
        assert (x - y).abs().max() <= 1e-10 * y.abs().max()
    layer, norm, tokens = layer.float(), None if norm is None else norm.float(), tokens.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        x, y = layer(tokens, norm), layer.plain(tokens, norm)
    assert x.dtype == y.dtype == torch.bfloat16
    assert (x - y).abs().max() <= 0.03 * y.abs().max()


def test_group_norm_is_torchs():
    norm, tokens = TokenGroupNorm(16).double(), torch.randn(2, 700, 16, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.uniform_(-1, 1)
        norm.bias.uniform_(-1, 1)
    expected = F.group_norm(tokens.transpose(1, 2), 8, norm.weight, norm.bias).transpose(1, 2).relu()
    torch.testing.assert_close(norm(tokens), expected)
    with torch.no_grad():
        torch.testing.assert_close(norm.with_moments_of(tokens)(tokens[:, 5:50]), expected[:, 5:50])
    inputs = [tokens[:, :20].clone().requires_grad_(), norm.weight, norm.bias]

    def run(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (tokens,))

    assert torch.autograd.gradcheck(run, inputs)


def test_prediction_leaves_its_input_alone():
    network, x = build(2, blocks_up=(1, 1, 0)).eval(), torch.randn(1, 1, 16, 16)
    features, before = [], x.clone()
    network.encoder.register_forward_hook(lambda module, inputs, out: features.extend((t, t.clone()) for t, _ in out))
    with torch.no_grad():
        network(x)
    assert torch.equal(x, before)
    assert all(torch.equal(*pair) for pair in features[:-1])  # skips; the last is the decoder's own


@pytest.fixture(params=["torch's kernel", "formulas"])
def norm_code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute a group norm: the one for CPUs, and the one for GPUs and compilers."""
    if request.param == "formulas":
        for module in (lightm_unet, token_moments):
            monkeypatch.setattr(module, "is_cpu_code", lambda tokens: False)
    return request.param


@pytest.mark.usefixtures("norm_code")
def test_gradients_of_group_norm():
    norm = TokenGroupNorm(16).double()
    values = (torch.randn(2, 20, 16), torch.rand(16) - 0.5, torch.rand(16) - 0.5)
    inputs = [x.double().requires_grad_() for x in values]

    def run(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (tokens,))

    assert torch.autograd.gradcheck(run, inputs)
    torch.testing.assert_close(run(*inputs), _exact(norm, *inputs))


def _exact(norm: TokenGroupNorm, tokens: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Torch's own group norm in float64, with ReLU."""
    weight, bias = (own if x is None else x for x, own in ((weight, norm.weight), (bias, norm.bias)))
    channels_first = tokens.double().transpose(1, 2)
    return F.group_norm(channels_first, 8, weight.double(), bias.double(), norm.eps).transpose(1, 2).relu()


@pytest.mark.usefixtures("norm_code")
@pytest.mark.parametrize("offset", [0, 10, 100])
def test_gradients_of_group_norm_keep_their_digits(offset):
    """Those of float32 on long sequences, against float64."""
    norm, tokens = TokenGroupNorm(16), torch.randn(2, 2**16, 16) + offset
    grad = torch.randn_like(tokens)
    with torch.no_grad():
        norm.bias.fill_(5)  # no value is near 0, where ReLU would tell rounding errors apart
    leaves = [tokens.requires_grad_(), norm.weight, norm.bias]
    found = torch.autograd.grad(norm(tokens), leaves, grad)
    expected = torch.autograd.grad(_exact(norm, tokens), leaves, grad.double())
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() < 4e-6 * max(1, offset) * y.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_group_norm_in_half_precision(dtype, autocast):
    """Statistics are in float32, and so is the result under autocast, as that of torch's own on GPUs."""
    norm, tokens = TokenGroupNorm(16), (torch.randn(2, 700, 16) + 3).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out = norm(tokens)
    assert out.dtype == (torch.float32 if autocast else dtype)
    tolerance = 1e-5 if autocast else torch.finfo(dtype).eps
    grad = torch.randn_like(out)
    expected = _exact(norm, tokens)
    assert (out - expected).abs().max() < tolerance * expected.abs().max()
    leaves = [tokens, norm.weight, norm.bias]
    found = torch.autograd.grad(out, leaves, grad)
    wanted = torch.autograd.grad(expected, leaves, torch.where(out > 0, grad, 0).double())
    for x, y, leaf in zip(found, wanted, leaves, strict=True):
        assert x.dtype == leaf.dtype
        assert (x - y).abs().max() < (torch.finfo(dtype).eps if leaf is tokens else 1e-4) * y.abs().max()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_group_norm(backend, dtype):
    norm, tokens = TokenGroupNorm(16), torch.randn(2, 1000, 16).to(dtype).requires_grad_()
    compiled = torch.compile(norm, backend=backend, fullgraph=True, dynamic=False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out, expected = compiled(tokens), norm(tokens)
    assert out.dtype == torch.float32 and out.stride() == tokens.stride()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    leaves = [tokens, norm.weight, norm.bias]
    grad = torch.randn_like(out)
    for x, y in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        tolerance = max(1e-4, torch.finfo(x.dtype).eps)
        torch.testing.assert_close(x, y, rtol=tolerance, atol=1e-4 * y.abs().max().item())


def test_group_norm_reads_tokens_as_they_lie(monkeypatch):
    """What runs on GPUs copies no tensor of their size to another layout, and makes as many as the class says."""
    for module in (lightm_unet, token_moments):
        monkeypatch.setattr(module, "is_cpu_code", lambda tokens: False)
    norm, tokens = TokenGroupNorm(16), torch.randn(2, 1000, 16, requires_grad=True)
    calls: list[str] = []

    class Large(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, Tensor) and x.numel() == tokens.numel():
                    assert x.stride() == tokens.stride(), function
                    calls.append(function.overloadpacket.__name__)
            return out

    grad = torch.ones_like(tokens)
    with Large():
        torch.autograd.grad(norm(tokens), tokens, grad)
    assert [name for name in calls if name not in ("detach", "alias", "slice")] == (
        ["addcmul", "relu_", "threshold_backward", "addcmul", "mul_", "addcmul", "addcmul_"]
    )


@pytest.mark.usefixtures("norm_code")
@pytest.mark.parametrize("length", [2**18, 2**17 - 1, 65537])
@pytest.mark.parametrize("offset", [0, 10, 100])
def test_group_norm_keeps_its_digits_on_long_sequences(offset, length):
    norm, tokens = TokenGroupNorm(8), torch.randn(1, length, 8) + offset
    exact = F.group_norm(tokens.double().transpose(1, 2), 8).transpose(1, 2).relu()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert (norm(tokens) - exact).abs().max() < 2e-6 * max(1, offset)


@pytest.mark.slow
@pytest.mark.by_hand
def test_width_32_is_30_times_as_fast_as_with_the_published_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 48^3, a full forward, the same outputs. With the published scan it takes about a minute."""
    if (reason := available_backends()["native"]) is not None:
        pytest.skip(reason)
    network, x = LightMUNet(3, 1, 3).eval(), torch.randn(1, 1, 48, 48, 48)
    with torch.no_grad():
        network(x)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            out = network(x)
            times.append(time.perf_counter() - start)
        as_a_whole(monkeypatch)  # as in the published code
        start = time.perf_counter()
        with use_published_scan():
            expected = network(x)
        published = time.perf_counter() - start
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    assert published > 30 * min(times)
