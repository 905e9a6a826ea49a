"""The Mamba block: parity with the published one, runs of its tokens equal to the whole, precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nnunetv2_lightnets.networks.mamba import Mamba
from nnunetv2_lightnets.networks.umamba import MambaLayer
from nnunetv2_lightnets.ops import token_moments
from nnunetv2_lightnets.ops.mamba_layer import native


def trained(d_model: int, **kwargs) -> Mamba:
    """A block whose parameters are away from where they start."""
    mamba = Mamba(d_model, **kwargs)
    with torch.no_grad():
        for parameter in mamba.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mamba


def test_outputs_and_gradients_are_the_published_ones(golden):
    case = golden("mamba_block")
    mamba = Mamba(case.manifest["kwargs"]["d_model"])
    mamba.load_state_dict({key.removeprefix("mamba."): tensor for key, tensor in case.state.items()})
    assert sum(p.numel() for p in mamba.parameters()) == case.manifest["n_params"]
    tokens = case.ordered("input", "a")[0].requires_grad_()
    out = mamba(tokens)
    torch.testing.assert_close(out, case.ordered("output", "a")[0], rtol=0, atol=1e-5)
    out.square().sum().backward()
    published = case.group("grad")
    torch.testing.assert_close(tokens.grad, published.pop("@input"), rtol=1e-4, atol=1e-5)
    published.pop("@loss")
    found = dict(mamba.named_parameters())
    assert {f"mamba.{key}" for key in found} == published.keys()
    for key, parameter in found.items():
        torch.testing.assert_close(parameter.grad, published[f"mamba.{key}"], rtol=1e-4, atol=1e-5, msg=key)


def test_starts_as_the_paper_says():
    mamba = Mamba(64)
    dt = F.softplus(mamba.dt_proj.bias)
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101
    # Log-uniform: the logarithms spread evenly, mean in the middle and deviation of the uniform distribution.
    logarithm = torch.log10(F.softplus(Mamba(2048).dt_proj.bias.detach()))
    assert logarithm.mean() == pytest.approx(-2, abs=0.05) and logarithm.std() == pytest.approx(2 / 12**0.5, abs=0.03)
    torch.testing.assert_close(mamba.A, -torch.arange(1.0, 17).expand(128, 16))
    assert torch.all(mamba.D == 1)
    assert mamba.dt_proj.weight.abs().max() <= mamba.dt_rank**-0.5 == 0.5


def test_a_token_sees_itself_and_those_before_it_in_its_own_sequence():
    mamba, tokens = trained(12), torch.randn(2, 50, 12)
    changed = tokens.clone()
    changed[0, 20] += 1
    before, after = mamba(tokens), mamba(changed)
    different = (before != after).any(-1)
    assert not different[1].any() and not different[0, :20].any() and different[0, 20:].all()


@pytest.fixture(params=[10, 33, 64, 99, 100])
def run_length(request, monkeypatch):
    """Tokens that are computed together, of 100 or more."""
    monkeypatch.setattr(native, "takes", lambda layer: False)
    monkeypatch.setitem(token_moments.NUMBERS, "cpu", 1)
    monkeypatch.setattr(token_moments, "FEWEST", request.param)


@pytest.mark.usefixtures("run_length")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sequence_in_parts_is_the_sequence_as_a_whole(dtype):
    mamba, tokens = trained(20, d_state=8, d_conv=3).to(dtype), torch.randn(2, 100, 20, dtype=dtype)
    with torch.no_grad():
        whole, parts = mamba.plain(tokens), mamba(tokens)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(parts, whole, rtol=0, atol=tolerance * whole.abs().max().item())


@pytest.mark.usefixtures("run_length")
@pytest.mark.parametrize("rates", [(1e-3, 1e-2), (1.0, 16.0), (100.0, 1000.0)])
def test_parts_are_equal_whatever_the_decay(rates):
    """From memories of thousands of tokens, where errors would add up, to none."""
    mamba, tokens = trained(8).double(), torch.randn(1, 2000, 8, dtype=torch.float64)
    with torch.no_grad():
        mamba.A_log.uniform_(*torch.tensor(rates).log().tolist())
        exact, mamba, tokens = mamba.plain(tokens), mamba.float(), tokens.float()
        whole, parts = mamba.plain(tokens), mamba(tokens)
    scale = exact.abs().max().item()
    assert (whole - exact).abs().max() < 1e-5 * scale
    assert (parts - exact).abs().max() < 1e-5 * scale


def test_the_operator_is_the_plain_block():
    """Outputs and gradients, the tokens' and every parameter's."""
    for mamba, dtype, tolerance in ((trained(12), torch.float32, 1e-5), (trained(12), torch.float64, 1e-10)):
        mamba, tokens = mamba.to(dtype), torch.randn(2, 50, 12, dtype=dtype, requires_grad=True)
        outputs = mamba(tokens), mamba.plain(tokens)
        grad = torch.randn_like(outputs[0])
        found, expected = (torch.autograd.grad(out, [tokens, *mamba.parameters()], grad) for out in outputs)
        for x, y in zip((outputs[0], *found), (outputs[1], *expected), strict=True):
            assert (x - y).abs().max() <= tolerance * y.abs().max()


@pytest.mark.parametrize("channels_are_tokens", [False, True])
def test_the_layer_of_umamba_is_its_plain_steps(channels_are_tokens):
    layer, x = MambaLayer(12, 35 if channels_are_tokens else None).double(), torch.randn(2, 12, 5, 7).double()
    leaves = [x.requires_grad_(), *layer.parameters()]
    tokens = x.flatten(2) if channels_are_tokens else x.flatten(2).mT
    mixed = layer.mamba.plain(layer.norm(tokens))
    outputs = layer(x), (mixed if channels_are_tokens else mixed.mT).reshape(x.shape)
    grad = torch.randn_like(x)
    found, expected = (torch.autograd.grad(out, leaves, grad) for out in outputs)
    for a, b in zip((outputs[0], *found), (outputs[1], *expected), strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_rounds_as_in_the_plain_block(autocast):
    mamba, tokens = trained(12), torch.randn(2, 50, 12)
    with torch.no_grad(), torch.autocast("cpu", autocast):
        found, expected = mamba(tokens), mamba.plain(tokens)
    assert found.dtype == expected.dtype == torch.float32
    assert (found - expected).abs().max() <= 4 * torch.finfo(autocast).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_what_half_precision_cannot_hold(dtype):
    """The scan's output reaches 1e6 in training (float16 ends at 65504), and so does the block's."""
    mamba, tokens = trained(16), torch.randn(1, 40, 16)
    with torch.no_grad():
        mamba.D.mul_(1e7)
    full = mamba(tokens)
    assert full.abs().max() > 65504
    with torch.autocast("cpu", dtype):
        found = mamba(tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, full, rtol=0, atol=0.03 * full.abs().max().item())
    (found / 1e7).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in mamba.parameters())


def test_runs_with_parameters_in_half_precision():
    mamba, tokens = trained(16), torch.randn(1, 40, 16)
    full = mamba(tokens)
    found = mamba.bfloat16()(tokens.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), full, rtol=0, atol=0.03 * full.abs().max().item())
