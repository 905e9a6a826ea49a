"""The operators as torch sees them: tracing, compiling, exporting, autocast, FLOPs, and errors of their users."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_lightnets import LightNetsError
from nnunetv2_lightnets.ops import available_backends, directional_scan, scan_order, selective_scan, use_backend
from nnunetv2_lightnets.ops.flops import register_flop_formulas
from nnunetv2_lightnets.ops.selective_scan import chunked, reference
from nnunetv2_lightnets.ops.selective_scan.record import Scan
from tests.ops.operator_call import operator_arguments

BACKENDS = [name for name in ("torch", "native") if available_backends()[name] is None]
OPERATORS = torch.ops.nnunetv2_lightnets


def _directional(dtype=torch.float32, batch=2, directions=4, channels=6, shape=(5, 7), state=3):
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=dtype)

    length = shape[0] * shape[1]
    tokens = (normal(batch, channels, length), normal(batch, directions, channels, length))
    A = -normal(directions, channels, state).exp()
    inputs = (normal(batch, directions, state, length), normal(batch, directions, state, length))
    return [*tokens, A, *inputs, normal(directions, channels), normal(directions, channels)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"D": False, "z": False, "bias": False}, {"layout": "channels-last"}, {"initial": True}]
)
def test_opcheck_selective_scan(backend, options, make_scan):
    _opcheck(backend, make_scan(length=66, **options).to(torch.float32).record())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("initial", [False, True])
def test_opcheck_directional_scan(backend, initial):
    *tensors, bias = _directional()
    initial_state = torch.randn(2, 4, 6, 3) if initial else None
    _opcheck(backend, Scan(*tensors, None, bias, initial_state, scan_order((5, 7)), True))


def _opcheck(backend, scan):
    arguments = operator_arguments(scan)
    leaves = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments
    ]
    with use_backend(backend):
        opcheck(OPERATORS.selective_scan.default, (*leaves, True, False))
        _, last_state, states, used = OPERATORS.selective_scan(*arguments, True, False)
        for grad_last_state in (None, torch.ones_like(last_state)):
            grads = (torch.ones_like(scan.u), grad_last_state)
            opcheck(OPERATORS.selective_scan_backward.default, (*grads, *arguments, states, used))


def _value_and_gradients(function, tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def test_compiles_as_one_graph(make_scan):
    tensors = make_scan(length=80).to(torch.float32).tensors
    order = scan_order((5, 7))

    def plain(*x):
        return 2 * selective_scan(*x, delta_softplus=True) + 1

    def directional(*x):
        return 2 * directional_scan(*x, delta_softplus=True, order=order) + 1

    for function, arguments in ((plain, tensors), (directional, _directional())):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for ours, wanted in zip(
            _value_and_gradients(compiled, arguments), _value_and_gradients(function, arguments), strict=True
        ):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


def test_compiled_scans_obey_the_backend_forced_when_they_run(make_scan, monkeypatch):
    tensors = make_scan(length=10).tensors
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: selective_scan(*x, True), fullgraph=True, backend="aot_eager")
    with use_backend("reference"):
        expected = _value_and_gradients(compiled, tensors)

    def fail(*_):
        raise AssertionError("the reference was not asked for")

    monkeypatch.setattr(reference, "forward", fail)
    monkeypatch.setattr(reference, "backward", fail)
    for ours, wanted in zip(_value_and_gradients(compiled, tensors), expected, strict=True):
        torch.testing.assert_close(ours, wanted)
    with use_backend("reference"), pytest.raises(AssertionError, match="not asked for"):
        compiled(*tensors)


@pytest.mark.parametrize("directional", [False, True])
def test_gradients_of_compiled_scans_are_computed_by_what_was_forced(directional, make_scan, monkeypatch):
    """Long after the block in which the output was computed, and with other backends forced."""
    used = []
    for module in (reference, chunked):
        for way in ("forward", "backward"):
            original, name = getattr(module, way), f"{module.NAME} {way}"
            monkeypatch.setattr(module, way, lambda *a, f=original, name=name: used.append(name) or f(*a))
    tensors = _directional() if directional else make_scan(length=10).tensors
    leaves = [x.detach().requires_grad_() for x in tensors]
    order = scan_order((5, 7))
    function = (lambda *x: directional_scan(*x, order=order)) if directional else selective_scan
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    outputs = []
    for name in ("reference", "torch"):
        with use_backend(name):
            outputs.append(compiled(*leaves))
    with use_backend("torch"):
        outputs[0].sum().backward()
    outputs[1].sum().backward()
    assert used == ["reference forward", "torch forward", "reference backward", "torch backward"]


def test_scans_from_an_initial_state_compile_and_export(make_scan):
    scan = make_scan(length=80, initial=True).to(torch.float32)

    def function(*x):
        out, last_state = selective_scan(*x[:-1], True, True, x[-1])
        return out.sum() + last_state.square().sum()

    tensors = (*scan.tensors, scan.initial_state)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, wanted in zip(
        _value_and_gradients(compiled, tensors), _value_and_gradients(function, tensors), strict=True
    ):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


@pytest.mark.slow
def test_compiles_by_inductor(make_scan):
    tensors = make_scan(length=80, layout="channels-last").to(torch.float32).tensors
    function = lambda *x: torch.relu(selective_scan(*x, True)) * 2  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    for ours, wanted in zip(
        _value_and_gradients(compiled, tensors), _value_and_gradients(function, tensors), strict=True
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


class _Exported(torch.nn.Module):
    def forward(self, u, delta, A, B, C, D, z, delta_bias):
        return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True)


def test_exports_with_any_length(make_scan):
    length = torch.export.Dim("length", min=2, max=1 << 20)
    by_dimension = [{2: length}, {2: length}, None, {3: length}, {3: length}, None, {2: length}, None]
    with torch.no_grad():
        program = torch.export.export(_Exported(), make_scan(length=70).tensors, dynamic_shapes=by_dimension)
        for other in (2, 64, 333):
            tensors = make_scan(length=other).tensors
            expected = selective_scan(*tensors, True)
            torch.testing.assert_close(program.module()(*tensors), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_leaves_scans_in_float32(backend, autocast, make_scan):
    """Float32 arguments are computed as without autocast, to the bit, and so are gradients."""
    scan = make_scan().to(torch.float32)
    plain = scan.run(backend)
    with torch.autocast("cpu", dtype=autocast):
        mixed = scan.run(backend)
    for name, wanted in plain.items():
        assert mixed[name].dtype == torch.float32
        assert torch.equal(mixed[name], wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_of_several_dtypes_take_the_widest(backend, make_scan):
    """As under autocast, where matrix products come in half precision and the rest does not."""
    u, delta, A, B, C, D, z, bias = make_scan().to(torch.float32).tensors
    half = u.bfloat16().requires_grad_()
    with use_backend(backend):
        out, last_state = selective_scan(half, delta, A.half(), B.bfloat16(), C, D.double(), z.half(), bias, True, True)
        expected, _ = selective_scan(
            half.float(), delta, A.half().float(), B.bfloat16().float(), C, D, z.half().float(), bias, True, True
        )
    assert (out.dtype, last_state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, expected.bfloat16(), rtol=0, atol=0)
    out.sum().backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.isfinite().all()


def test_operators_refuse_what_backends_would_misread(make_scan):
    u, delta, A, B, C, D, z, bias = make_scan().to(torch.float32).tensors
    with pytest.raises(LightNetsError, match=r"got torch\.bfloat16 .* beside u in torch\.float32"):
        OPERATORS.selective_scan(u, delta.bfloat16(), A, B, C, D, z, bias, None, None, True, False, False)
    with pytest.raises(LightNetsError, match=r"parameter in torch\.bfloat16"):
        OPERATORS.selective_scan(u, delta, A.bfloat16(), B, C, D, z, bias, None, None, True, False, False)
    for elsewhere in ({"delta": delta.to("meta")}, {"D": D.to("meta")}):  # torch itself computes with the fake kernel
        with pytest.raises(LightNetsError, match=r"on meta.* move all arguments to one device"):
            replace(Scan(u, delta, A, B, C, D, z, bias), **elsewhere).check()


def test_states_are_saved_only_for_gradients(make_scan, monkeypatch):
    saved = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *a: saved.append(a[-1]) or forward(*a))
    tensors = make_scan(length=5).tensors
    leaves = [x.detach().requires_grad_() for x in tensors]
    with use_backend("reference"):
        selective_scan(*tensors, True)
        with torch.no_grad():
            selective_scan(*leaves, True)
        with torch.inference_mode():
            selective_scan(*leaves, True)
        selective_scan(*leaves, True)
    assert saved == [False, False, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_without_saved_states(backend, make_scan):
    """The operator called directly, by somebody who forgot to save states, computes them again."""
    scan = make_scan(length=130, initial=True)
    leaves = [x.requires_grad_() for x in scan.record().tensors()]
    with use_backend(backend):
        with_states, without = (
            torch.autograd.grad(OPERATORS.selective_scan(*leaves, None, True, save, False)[0].square().sum(), leaves)
            for save in (True, False)
        )
    for ours, wanted in zip(without, with_states, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_initial_state_may_come_in_any_dtype(backend, make_scan):
    scan = make_scan(initial=True).to(torch.bfloat16)
    initial_state = scan.initial_state.bfloat16().requires_grad_()
    with use_backend(backend):
        out, last_state = selective_scan(*scan.tensors, True, True, initial_state)
        expected, expected_state = selective_scan(*scan.tensors, True, True, initial_state.float())
    assert (out.dtype, last_state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, expected) and torch.equal(last_state, expected_state)
    (grad,) = torch.autograd.grad(last_state.sum(), initial_state)
    assert grad.dtype == torch.bfloat16 and grad.abs().sum() > 0


def test_double_backward_is_refused(make_scan):
    leaves = [x.requires_grad_() for x in make_scan(length=5).tensors]
    (grad,) = torch.autograd.grad(selective_scan(*leaves, True).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(LightNetsError, match="gradients of gradients"):
        grad.sum().backward()


def test_flops(make_scan):
    """MACs as documented: 2 and 5 for a state's update and output, forwards and backwards, 1 and 2 for the skip."""
    register_flop_formulas()
    batch, channels, length, state = 2, 6, 70, 3
    leaves = [x.requires_grad_() for x in make_scan(batch, channels, length, state).tensors]
    updates, skips = batch * channels * length * state, batch * channels * length
    with FlopCounterMode(display=False) as counter:
        out = selective_scan(*leaves, True)
    assert counter.get_total_flops() / 2 == 2 * updates + skips
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() / 2 == 5 * updates + 2 * skips
    with FlopCounterMode(display=False) as counter:
        selective_scan(*leaves[:5])
    assert counter.get_total_flops() / 2 == 2 * updates

    leaves = [x.requires_grad_() for x in _directional(batch=2, directions=4, channels=6, state=3)]
    updates, skips = 2 * 4 * 6 * 35 * 3, 2 * 4 * 6 * 35
    with FlopCounterMode(display=False) as counter:
        out = directional_scan(*leaves, order=scan_order((5, 7)))
    assert counter.get_total_flops() / 2 == 2 * updates + skips
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() / 2 == 5 * updates + 2 * skips


def test_the_example_of_the_documentation():
    page = Path(__file__).parents[2] / "docs" / "selective_scan.md"
    code = page.read_text().partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code, names)
    u, delta, A, B, C = (names[name] for name in ("u", "delta", "A", "B", "C"))
    with use_backend("torch"):
        expected = selective_scan(u, delta, A, B, C, delta_softplus=True)
    torch.testing.assert_close(names["y"], expected, rtol=1e-4, atol=1e-4)


def _python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("counter_first", [True, False])
def test_flops_are_registered_whatever_is_imported_first(counter_first):
    imports = [
        "from torch.utils.flop_counter import FlopCounterMode",
        "from nnunetv2_lightnets.ops import causal_conv1d",
    ]
    code = "; ".join(imports if counter_first else reversed(imports))
    code += """
import torch
from nnunetv2_lightnets.ops.flops import register_flop_formulas
register_flop_formulas()
register_flop_formulas()
with FlopCounterMode(display=False) as counter:
    causal_conv1d(torch.ones(2, 3, 5), torch.ones(3, 4))
print(counter.get_total_flops())"""
    assert _python(code) == str(2 * 2 * 3 * 5 * 4)


def test_importing_and_scanning_import_no_optional_package():
    code = """
import sys, torch
from nnunetv2_lightnets.ops import selective_scan
x = torch.ones(1, 2, 3)
selective_scan(x, x, -torch.ones(2, 2), x, x)
print([name for name in ("triton", "mamba_ssm", "selective_scan_cuda", "causal_conv1d", "torch._dynamo", "nnunetv2")
       if name in sys.modules])"""
    assert _python(code) == "[]"


SHAPE_ERRORS = {
    "u": (torch.ones(2, 3), r"u has shape \(2, 3\), expected \(any, any, any\)"),
    "delta": (torch.ones(2, 6, 71), r"delta has shape \(2, 6, 71\), expected \(2, 6, 70\)"),
    "A": (-torch.ones(5, 3), r"A has shape \(5, 3\), expected \(6, any\)"),
    "B": (torch.ones(2, 1, 4, 70), r"B has shape \(2, 1, 4, 70\), expected \(2, any, 3, 70\)"),
    "C": (torch.ones(6, 3), r"C has shape \(6, 3\)"),  # mamba-ssm's constant form
    "D": (torch.ones(5), r"D has shape \(5,\), expected \(6\)"),
    "z": (torch.ones(2, 6, 1), r"z has shape \(2, 6, 1\)"),
    "delta_bias": (torch.ones(6, 1), r"delta_bias has shape \(6, 1\)"),
    "initial_state": (torch.ones(2, 3, 6), r"initial_state has shape \(2, 3, 6\), expected \(2, 6, 3\)"),
}


@pytest.mark.parametrize("name", SHAPE_ERRORS)
def test_wrong_shapes_are_named(name, make_scan):
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    arguments = dict(zip(names, make_scan().tensors, strict=True))
    arguments[name], message = SHAPE_ERRORS[name]
    with pytest.raises(LightNetsError, match=message):
        selective_scan(**arguments)


def test_other_misuse_is_named(make_scan):
    u, delta, A, B, C, *_ = make_scan(channels=6).tensors
    with pytest.raises(LightNetsError, match="4 groups for 6 channels"):
        selective_scan(u, delta, A, B.expand(-1, 4, -1, -1), C.expand(-1, 4, -1, -1))
    with pytest.raises(LightNetsError, match=r"torch\.complex128"):
        selective_scan(u, delta, A.to(torch.complex128), B, C)
    with pytest.raises(LightNetsError, match=r"torch\.int64"):
        selective_scan(u.long(), delta, A, B, C)
    with pytest.raises(LightNetsError, match=r"u has shape \(2, 6, 0\)"):
        selective_scan(u[..., :0], delta[..., :0], A, B[..., :0], C[..., :0])
