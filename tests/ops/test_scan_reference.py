"""The reference against the authors' own code, hand-made cases, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from nnunetv2_lightnets.ops import available_backends, selective_scan, use_backend

BACKENDS = [name for name, reason in available_backends().items() if reason is None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_scan_equals_the_published_one(golden, backend):
    case = golden("selective_scan")
    u, delta, B, C = (x.requires_grad_() for x in case.ordered("input", "a"))
    A_logs, D, delta_bias = (case.state[name].requires_grad_() for name in ("A_logs", "D", "delta_bias"))
    with use_backend(backend):
        out = selective_scan(u, delta, -torch.exp(A_logs), B, C, D, None, delta_bias, True)
    torch.testing.assert_close(out, case.ordered("output", "a")[0], rtol=1e-5, atol=case.manifest["atol"])
    (out**2).sum().backward()
    grads = case.group("grad")
    for name, leaf in {"@input0": u, "@input1": delta, "@input2": B, "@input3": C}.items():
        torch.testing.assert_close(leaf.grad, grads[name], rtol=1e-4, atol=1e-4)
    for name, leaf in {"A_logs": A_logs, "D": D, "delta_bias": delta_bias}.items():
        torch.testing.assert_close(leaf.grad, grads[name], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_scan_equals_mambas(golden, backend):
    case = golden("selective_scan_gated")
    leaves = {name: x.requires_grad_() for name, x in case.group("arg").items()}
    with use_backend(backend):
        out, last_state = selective_scan(**leaves, delta_softplus=True, return_last_state=True)
    expected = case.group("output")
    torch.testing.assert_close(out, expected["out"], rtol=1e-5, atol=case.manifest["atol"])
    torch.testing.assert_close(last_state, expected["last_state"], rtol=1e-5, atol=case.manifest["atol"])
    (out**2).sum().backward()
    for name, grad in case.group("grad").items():
        torch.testing.assert_close(leaves[name].grad, grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_impulse_decays_exponentially(backend):
    """One channel, one state: an impulse of 1 at t = 0 is step * B * C, then decays by exp(step * A) a token."""
    length, step, A, B, C = 200, 0.5, -0.3, 2.0, 3.0
    u = torch.zeros(1, 1, length, dtype=torch.float64)
    u[..., 0] = 1
    one = torch.ones_like(u)
    with use_backend(backend):
        out = selective_scan(u, step * one, torch.full((1, 1), A, dtype=torch.float64), B * one, C * one)
    expected = step * B * C * torch.exp(step * A * torch.arange(length, dtype=torch.float64))
    torch.testing.assert_close(out[0, 0], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softplus_skip_and_gate(backend):
    """A = -inf forgets everything, so that every token stands for itself."""
    u, delta, z = (torch.tensor([[x]], dtype=torch.float64) for x in ([1.0, -2.0], [0.3, 25.0], [0.5, -1.0]))
    B, C, D, bias = (torch.tensor(x, dtype=torch.float64) for x in ([[[2.0, 3.0]]], [[[5.0, 7.0]]], [11.0], [0.1]))
    A = torch.full((1, 1), -1e300, dtype=torch.float64)
    with use_backend(backend):
        out = selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True)
    step = [math.log1p(math.exp(0.4)), 25.1]
    gate = [0.5 / (1 + math.exp(-0.5)), -1.0 / (1 + math.exp(1.0))]
    expected = [(step[0] * 2 * 5 + 11) * gate[0], (step[1] * -2 * 3 * 7 + 11 * -2) * gate[1]]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("initial", [True, False])
def test_gradients_equal_finite_differences(backend, softplus, initial, make_scan):
    scan = make_scan(batch=2, channels=2, length=5, state=2, groups=2, softplus=softplus, initial=initial)
    leaves = [x.requires_grad_() for x in scan.tensors]
    if initial:
        leaves.append(scan.initial_state.requires_grad_())
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda *x: selective_scan(*x[:8], softplus, True, *x[8:]), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_initial_state_decays(backend):
    """Without inputs, a state of 2 gives 2 C exp(step * A) at the first token, and so on."""
    zero = torch.zeros(1, 1, 100, dtype=torch.float64)
    A, state = torch.full((1, 1), -0.3, dtype=torch.float64), torch.full((1, 1, 1), 2.0, dtype=torch.float64)
    with use_backend(backend):
        out, last = selective_scan(zero, zero + 0.5, A, zero, zero + 3, return_last_state=True, initial_state=state)
    expected = 2 * torch.exp(-0.15 * torch.arange(1, 101, dtype=torch.float64))
    torch.testing.assert_close(out[0, 0], 3 * expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(last.flatten(), expected[-1:], rtol=1e-12, atol=0)
