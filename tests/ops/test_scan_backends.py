"""Every backend that runs on this machine's CPU against the reference in float64, outputs and all gradients."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunetv2_lightnets.ops import available_backends, selective_scan, use_backend
from nnunetv2_lightnets.ops.selective_scan import chunked
from nnunetv2_lightnets.ops.selective_scan.dispatch import NAMES
from tests.ops.operator_call import operator_arguments

BACKENDS = [name for name in ("torch", "native") if available_backends()[name] is None]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
LAYOUTS = ["contiguous", "channels-last", "sliced", "strided", "expanded"]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(scope="session")
def expected(make_scan):
    """The reference's results in float64, computed once for all backends."""

    @cache
    def compute(dtype: torch.dtype, **case):
        scan = make_scan(**case).to(dtype)
        return scan, scan.to(torch.float64).run("reference")

    return lambda dtype, case: compute(dtype, **case)


SHAPES = [
    *({"length": length} for length in (1, 2, 3, 7, 63, 64, 65)),
    {"length": 129, "state": 1, "channels": 1, "batch": 1},
    {"length": 191, "state": 64, "channels": 3},
    {"length": 66, "state": 16, "channels": 17, "groups": 1},
    {"length": 66, "state": 5, "channels": 20, "groups": 4},
    {"length": 100, "state": 7, "channels": 35, "groups": 35},
    {"length": 1023, "state": 64, "channels": 32},  # several blocks of several chunks
    {"length": 200, "state": 64, "channels": 41},  # blocks of one chunk
    {"length": 4097, "state": 2, "channels": 3, "batch": 1},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: "-".join(f"{k}{v}" for k, v in case.items()))
def test_shapes(backend, dtype, case, expected, assert_close):
    scan, wanted = expected(dtype, case)
    assert_close(scan.run(backend), wanted, TOLERANCE[dtype])


@pytest.mark.skipif("native" not in BACKENDS, reason="the C library is not built")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("length", "state", "channels"), [(1024, 16, 33), (2047, 5, 8), (2049, 16, 17), (4096, 64, 2), (4097, 16, 40)]
)
def test_native_over_many_chunks(length, state, channels, dtype, make_scan, assert_close):
    """Against the torch backend in float64, which is fast enough at these lengths."""
    scan = make_scan(batch=1, length=length, state=state, channels=channels, layout="channels-last").to(dtype)
    assert_close(scan.run("native"), scan.to(torch.float64).run("torch"), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flags", range(16))
def test_optional_arguments(backend, flags, expected, assert_close):
    given_arguments = {name: bool(flags >> bit & 1) for bit, name in enumerate(("D", "z", "bias", "softplus"))}
    scan, wanted = expected(torch.float64, {"length": 67, "groups": 2, **given_arguments})
    assert_close(scan.run(backend), wanted, TOLERANCE[torch.float64])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(backend, dtype, layout, expected, assert_close):
    scan, wanted = expected(dtype, {"length": 90, "channels": 12, "state": 8, "groups": 3, "layout": layout})
    results = scan.run(backend)
    assert_close(results, wanted, TOLERANCE[dtype])
    assert results["out"].dtype == dtype
    assert results["out"].stride() == torch.empty_like(scan.tensors[0]).stride()
    assert results["last_state"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert results["B"].dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_output_is_used(backend, make_scan, assert_close):
    scan = make_scan()
    wanted = scan.run("reference", grad_last_state=False)
    assert_close(scan.run(backend, grad_last_state=False), wanted, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_last_state_is_used(backend, make_scan):
    grads = {}
    for name in ("reference", backend):
        leaves = [x.detach().requires_grad_() for x in make_scan().tensors]
        with use_backend(name):
            last_state = selective_scan(*leaves, True, return_last_state=True)[1]
        grads[name] = torch.autograd.grad(last_state.square().sum(), leaves)
    for ours, wanted in zip(grads[backend], grads["reference"], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


@settings(
    max_examples=520, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    case=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 3),
            "length": st.one_of(st.integers(1, 9), st.integers(10, 70), st.sampled_from([63, 64, 65, 127, 128, 129])),
            "state": st.one_of(st.integers(1, 5), st.sampled_from([8, 15, 16, 17, 31])),
            "layout": st.sampled_from(LAYOUTS),
            "D": st.booleans(),
            "z": st.booleans(),
            "bias": st.booleans(),
            "softplus": st.booleans(),
            "initial": st.booleans(),
            "seed": st.integers(0, 10**6),
        }
    ),
    groups=st.integers(1, 3),
    per_group=st.one_of(st.integers(1, 5), st.sampled_from([8, 15, 16, 17])),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16]),
    grad_last_state=st.booleans(),
    width=st.sampled_from([1, 300, 4000, chunked.WIDTH["cpu"]]),
)
def test_any_scan(case, groups, per_group, dtype, grad_last_state, width, make_scan, assert_close):
    scan = make_scan(**case, groups=groups, channels=groups * per_group).to(dtype)
    wanted = scan.to(torch.float64).run("reference", grad_last_state=grad_last_state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunked.WIDTH, "cpu", width)  # so that blocks of few and many chunks occur
        for backend in BACKENDS:
            results = scan.run(backend, grad_last_state=grad_last_state)
            assert_close(results, wanted, TOLERANCE[dtype], backend, floor=1.0)


def test_backends_share_the_format_of_saved_states(make_scan):
    """Each can compute gradients from what any other has saved."""
    scan = make_scan(batch=2, channels=6, length=200, state=3, groups=2, initial=True)
    arguments = operator_arguments(scan.record())
    operator = torch.ops.nnunetv2_lightnets
    grad = torch.randn_like(scan.tensors[0])
    results = []
    for before in ("reference", *BACKENDS):
        with use_backend(before):
            states = operator.selective_scan(*arguments, True, False)[2]
        assert states.shape == (2 * 4 * 6 * 3,)
        for after in ("reference", *BACKENDS):
            used = torch.tensor(NAMES.index(after))
            results.append(operator.selective_scan_backward(grad, None, *arguments, states, used))
    for gradients in results[1:]:
        for ours, wanted in zip(gradients, results[0], strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)
