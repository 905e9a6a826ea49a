"""The causal convolution against torch's own, with its native kernel and without."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_lightnets import LightNetsError
from nnunetv2_lightnets.ops import available_backends, causal_conv1d, use_backend
from nnunetv2_lightnets.ops.flops import register_flop_formulas

conv_module = sys.modules["nnunetv2_lightnets.ops.causal_conv1d"]
BACKENDS = [name for name in ("torch", "native") if available_backends()[name] is None]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _expected(x, weight, bias, activation):
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    out = F.conv1d(padded, weight[:, None], bias, groups=x.shape[1])
    return F.silu(out) if activation else out


def _random(batch, channels, length, width, layout="contiguous", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = {
        "contiguous": lambda: normal(batch, channels, length),
        "channels-last": lambda: normal(batch, length, channels).mT,
        "sliced": lambda: normal(batch, length, 2 * channels)[..., :channels].mT,
        "expanded": lambda: normal(batch, 1, length).expand(-1, channels, -1),
    }[layout]()
    return x, normal(channels, width), normal(channels)


def _check(backend, arguments, activation, dtype, assert_close):
    arguments = [None if x is None else x.to(dtype) for x in arguments]
    grad = torch.randn(arguments[0].shape).bfloat16()
    results = []
    for function, cast in ((causal_conv1d, dtype), (_expected, torch.float64)):
        leaves = [None if x is None else x.to(cast).detach().requires_grad_() for x in arguments]
        with use_backend(backend):
            out = function(*leaves, activation)
            grads = torch.autograd.grad(out, [x for x in leaves if x is not None], grad.to(cast))
        results.append(dict(zip(("out", "x", "weight", "bias"), (out.detach(), *grads), strict=False)))
    assert results[0]["out"].dtype == dtype
    assert results[0]["out"].stride() == torch.empty_like(arguments[0]).stride()
    assert_close(*results, TOLERANCE[dtype], backend, floor=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced", "expanded"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_equals_torchs_convolution(backend, dtype, layout, activation, assert_close):
    _check(backend, _random(2, 17, 70, 4, layout), activation, dtype, assert_close)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 20),
    length=st.integers(1, 140),
    width=st.integers(1, 9),
    layout=st.sampled_from(["contiguous", "channels-last", "sliced"]),
    seed=st.integers(0, 10**6),
    activation=st.sampled_from([None, "silu"]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_convolution(batch, channels, length, width, layout, seed, activation, bias, dtype, assert_close):
    x, weight, b = _random(batch, channels, length, width, layout, seed)
    for backend in BACKENDS:
        _check(backend, (x, weight, b if bias else None), activation, dtype, assert_close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_longer_than_what_native_takes(backend, assert_close):
    _check(backend, _random(1, 3, 200, 130), "silu", torch.float64, assert_close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator(backend):
    with use_backend(backend):
        x, weight, bias = (y.requires_grad_() for y in _random(2, 4, 20, 4, "channels-last"))
        operator = torch.ops.nnunetv2_lightnets
        assert torch.autograd.gradcheck(lambda *y: causal_conv1d(*y, "silu"), (x, weight, bias), atol=1e-6)
        for b in (bias, None):
            opcheck(operator.causal_conv1d.default, (x, weight, b, True))
            arguments = (torch.ones_like(x), x.detach(), weight.detach(), None if b is None else b.detach(), True)
            opcheck(operator.causal_conv1d_backward.default, arguments)
        compiled = torch.compile(lambda *y: causal_conv1d(*y, "silu") * 2, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, weight, bias), causal_conv1d(x, weight, bias, "silu") * 2)
        (grad,) = torch.autograd.grad(causal_conv1d(x, weight, bias).sum(), x, create_graph=True)
        with pytest.raises(LightNetsError, match="gradients of gradients"):
            grad.sum().backward()


def test_half_precision_with_float32_weights(assert_close):
    """As under autocast: the input comes in half precision, parameters do not."""
    x, weight, bias = _random(2, 8, 50, 4, "channels-last")
    x, weight, bias = x.bfloat16(), weight.float().requires_grad_(), bias.float().requires_grad_()
    for backend in BACKENDS:
        with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
            out = causal_conv1d(x, weight, bias, "silu")
        expected = _expected(x.double(), weight.double(), bias.double(), "silu")
        torch.testing.assert_close(out, expected.bfloat16(), rtol=1e-2, atol=1e-3)
        (grad,) = torch.autograd.grad(out.float().sum(), weight)
        assert grad.dtype == torch.float32


def test_flops():
    register_flop_formulas()
    x, weight, bias = (y.requires_grad_() for y in _random(2, 4, 20, 3))
    with FlopCounterMode(display=False) as counter:
        out = causal_conv1d(x, weight, bias, "silu")
    assert counter.get_total_flops() / 2 == 2 * 4 * 20 * 3
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() / 2 == 2 * 2 * 4 * 20 * 3


def test_misuse_is_named():
    x, weight, bias = _random(2, 4, 20, 3)
    for arguments, message in [
        ((x, weight, bias, "relu"), "activation is 'relu'; it must be None or 'silu'"),
        ((x[0], weight), r"x is torch\.float64 \(4, 20\)"),
        ((x.long(), weight), r"x is torch\.int64"),
        ((x, weight[1:]), r"weight has shape \(3, 3\), expected \(4, any\)"),
        ((x, weight, bias[1:]), r"bias has shape \(3,\), expected \(4,\)"),
    ]:
        with pytest.raises(LightNetsError, match=message):
            causal_conv1d(*arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_checks_what_its_kernels_rely_on(backend):
    """A graph calls it without the public function; a weight of one channel would broadcast, or be read beyond."""
    x, weight, bias = _random(2, 4, 20, 3)
    operators = torch.ops.nnunetv2_lightnets
    with use_backend(backend):
        for bad_weight, bad_bias, message in (
            (weight[:1], bias, "weight has shape"),
            (weight, bias[:1], "bias has shape"),
        ):
            with pytest.raises(LightNetsError, match=message):
                operators.causal_conv1d(x, bad_weight, bad_bias, True)
            with pytest.raises(LightNetsError, match=message):
                operators.causal_conv1d_backward(x, x, bad_weight, bad_bias, True)
        with pytest.raises(LightNetsError, match="grad has shape"):
            operators.causal_conv1d_backward(x[:, :, 1:], x, weight, bias, True)


@pytest.fixture
def fake_package(monkeypatch):
    """Installs a function as that of the package causal-conv1d, with CPU tensors standing for those of a GPU."""

    def install(function):
        monkeypatch.setitem(sys.modules, "causal_conv1d", types.SimpleNamespace(causal_conv1d_fn=function))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(conv_module, "PACKAGE_DEVICE", "cpu")
        conv_module.package_unavailable.cache_clear()
        return conv_module.package_unavailable()

    yield install
    conv_module.package_unavailable.cache_clear()


def test_the_package_is_used_only_where_it_gives_correct_results(fake_package):
    def works(x, weight, bias=None, activation=None):
        return _expected(x, weight, bias, activation)

    def crashes(*_, **__):
        raise RuntimeError("no kernel image")

    assert fake_package(works) is None
    assert "no kernel image" in fake_package(crashes)
    assert "wrong results" in fake_package(lambda *a, **k: works(*a, **k) + 1)
    assert "wrong results" in fake_package(lambda x, w, b, activation: works(x, w.detach() * w / w.detach(), b) * 1)


def test_the_package_gets_only_what_its_kernel_reads(fake_package):
    fake_package(lambda x, weight, bias=None, activation=None: _expected(x, weight, bias, activation))
    weight = torch.ones(8, 4)
    assert conv_module._package_takes(torch.ones(2, 8, 5), weight)
    assert conv_module._package_takes(torch.ones(2, 5, 8).mT, weight)
    assert not conv_module._package_takes(torch.ones(2, 5, 9).mT[:, :8], weight)  # rows that are not aligned
    assert not conv_module._package_takes(torch.ones(2, 8, 5).double(), weight)
    assert not conv_module._package_takes(torch.ones(2, 8, 5), torch.ones(8, 5))
    with use_backend("torch"):
        assert not conv_module._package_takes(torch.ones(2, 8, 5), weight)


def test_the_faster_of_package_and_triton_is_taken(fake_package, monkeypatch):
    fake_package(lambda x, weight, bias=None, activation=None: _expected(x, weight, bias, activation))
    x, weight, bias = (y.float() for y in _random(2, 8, 20, 4, "channels-last"))
    arguments = (x.requires_grad_(), weight, bias, "silu")
    assert conv_module._package_first(*arguments)  # the kernel takes no tensors on a CPU
    monkeypatch.setattr(conv_module.by_triton, "takes", lambda x, weight: True)
    monkeypatch.setattr(conv_module, "_kernel", lambda *_: conv_module.by_torch)  # in Triton's place
    calls = []

    def choose(name, key, candidates, run, device):
        for candidate in candidates:
            run(candidate)
        calls.append((candidates, key))
        return "causal-conv1d"

    monkeypatch.setattr(conv_module.tuning, "choose", choose)
    assert conv_module._package_first(*arguments)
    with torch.no_grad():
        assert conv_module._package_first(*arguments)
    with torch.inference_mode():
        assert conv_module._package_first(x.clone(), weight, None, None)
    assert [candidates for candidates, _ in calls] == [("triton", "causal-conv1d")] * 3
    assert [key[-1] for _, key in calls] == ["gradients", "no gradients", "no gradients"]
    assert calls[0][1][:4] == ("float32", "channels-last", "kernel size 4, SiLU", "up to 64 tokens, 8 channels")
    for forced, package in (("mamba_ssm", True), ("triton", False)):
        with use_backend(forced):
            assert conv_module._package_first(*arguments) == package
    assert len(calls) == 3


@pytest.mark.skipif("native" not in BACKENDS, reason="torch's operations are all there is")
def test_gradients_come_from_the_backend_that_was_forced(monkeypatch):
    """Also where they are computed after the block, or in a thread of their own, as on GPUs."""
    x, weight, bias = (y.requires_grad_() for y in _random(2, 4, 20, 3))
    used = []
    for name, module in (("torch", conv_module.by_torch), ("native", conv_module.native)):
        monkeypatch.setattr(module, "backward", lambda *a, name=name, run=module.backward: used.append(name) or run(*a))
    for forced in ("torch", "native"):
        with use_backend(forced):
            out = causal_conv1d(x, weight, bias, "silu")
        out.sum().backward()
    causal_conv1d(x, weight, bias, "silu").sum().backward()
    assert used == ["torch", "native", "native"]
