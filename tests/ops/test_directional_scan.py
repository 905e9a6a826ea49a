"""Scans of images in several directions, against their definition by plain scans of gathered tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_lightnets import LightNetsError
from nnunetv2_lightnets.ops import (
    CROSS_SCAN,
    available_backends,
    directional_scan,
    scan_order,
    selective_scan,
    use_backend,
)
from nnunetv2_lightnets.ops.selective_scan.dispatch import NAMES

BACKENDS = [name for name, reason in available_backends().items() if reason is None]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _arguments(batch, channels, length, state, directions, *, D=True, bias=True, channels_last=False, seed=0):
    """Random u, delta, A, B, C, D, delta_bias in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        if not channels_last or shape[-1] != length:
            return x
        # (B, L, D) memory, and (B, L, K, D) or (B, K, L, D)
        return x.mT.contiguous().mT if seed % 2 else x.movedim(-1, 1).contiguous().movedim(1, -1)

    return [
        normal(batch, channels, length),
        normal(batch, directions, channels, length),
        -normal(directions, channels, state).exp(),
        normal(batch, directions, state, length),
        normal(batch, directions, state, length),
        normal(directions, channels) if D else None,
        normal(directions, channels) if bias else None,
    ]


def _definition(u, delta, A, B, C, D, bias, order, softplus):
    """Gather, scan every direction by the textbook, put back, sum."""
    total = torch.zeros_like(u)
    for k, path in enumerate(order.long()):
        with use_backend("reference"):
            y = selective_scan(
                u[..., path],
                delta[:, k][..., path],
                A[k],
                B[:, k][..., path],
                C[:, k][..., path],
                None if D is None else D[k],
                None,
                None if bias is None else bias[k],
                softplus,
            )
        total[..., path] += y
    return total


def _gradients_of_definition(arguments, order, softplus, grad):
    """By finite-difference-checked plain scans and autograd's own gathers."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in arguments]
    u, delta, A, B, C, D, bias = leaves
    total = 0
    with use_backend("reference"):
        for k, path in enumerate(order.long()):
            y = selective_scan(
                u[..., path],
                delta[:, k][..., path],
                A[k],
                B[:, k][..., path],
                C[:, k][..., path],
                None if D is None else D[k],
                None,
                None if bias is None else bias[k],
                softplus,
            )
            total = total + y[..., torch.argsort(path)]
    return torch.autograd.grad(total, [x for x in leaves if x is not None], grad)


def _check(backend, arguments, order, softplus, dtype, assert_close):
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = (0, 1, 3, 4)
    arguments = [None if x is None else x.to(dtype if i in tokens else parameter) for i, x in enumerate(arguments)]
    grad = torch.randn(arguments[0].shape).bfloat16()
    doubles = [None if x is None else x.double() for x in arguments]
    wanted = [
        _definition(*doubles, order, softplus),
        *_gradients_of_definition(doubles, order, softplus, grad.double()),
    ]
    leaves = [None if x is None else x.detach().requires_grad_() for x in arguments]
    with use_backend(backend):
        y = directional_scan(*leaves, softplus, order=order)
    assert y.dtype == dtype and y.stride() == torch.empty_like(arguments[0]).stride()
    ours = [y.detach(), *torch.autograd.grad(y, [x for x in leaves if x is not None], grad.to(dtype))]
    names = ("y", "u", "delta", "A", "B", "C", "D", "delta_bias")
    names = [name for name, x in zip(names, [y, *leaves], strict=True) if x is not None]
    assert_close(
        dict(zip(names, ours, strict=True)), dict(zip(names, wanted, strict=True)), TOLERANCE[dtype], backend, floor=1.0
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("channels_last", "seed"), [(False, 0), (True, 0), (True, 1)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (13, 11)])
def test_equals_the_definition(backend, dtype, channels_last, seed, shape, assert_close):
    arguments = _arguments(2, 6, shape[0] * shape[1], 4, 4, channels_last=channels_last, seed=seed)
    _check(backend, arguments, scan_order(shape), True, dtype, assert_close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_volumes_equal_the_definition(backend, dtype, assert_close):
    """Six directions through a volume: three axis orders, forwards and backwards."""
    axes = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    order = scan_order((3, 4, 7), [(a, backwards) for backwards in (False, True) for a in axes])
    arguments = _arguments(2, 5, 84, 3, 6, channels_last=True)
    _check(backend, arguments, order, True, dtype, assert_close)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 12)),
    batch=st.integers(1, 2),
    channels=st.integers(1, 9),
    state=st.integers(1, 6),
    directions=st.integers(1, 4),
    D=st.booleans(),
    bias=st.booleans(),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 10**6),
)
def test_any_directional_scan(
    shape, batch, channels, state, directions, D, bias, channels_last, dtype, seed, assert_close
):
    """Paths are any permutations of the pixels."""
    length = shape[0] * shape[1]
    torch.manual_seed(seed)
    order = torch.stack([torch.randperm(length) for _ in range(directions)]).int()
    arguments = _arguments(
        batch, channels, length, state, directions, D=D, bias=bias, channels_last=channels_last, seed=seed
    )
    for backend in BACKENDS:
        _check(backend, arguments, order, True, dtype, assert_close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_softplus(backend, assert_close):
    arguments = _arguments(1, 3, 12, 2, 2)
    arguments[1], arguments[6] = arguments[1].abs(), arguments[6].abs()
    _check(backend, arguments, scan_order((3, 4))[:2], False, torch.float64, assert_close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_finite_differences(backend):
    leaves = [x.requires_grad_() for x in _arguments(1, 2, 4, 2, 2)]
    order = scan_order((2, 2))[1:3]
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda *x: directional_scan(*x, True, order=order), leaves)


def test_backends_share_the_format_of_saved_states():
    u, delta, A, B, C, D, bias = (x.contiguous() for x in _arguments(2, 3, 150, 2, 4))
    initial_state = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    arguments = (u, delta, A, B, C, D, None, bias, initial_state, scan_order((10, 15)), True)
    operator = torch.ops.nnunetv2_lightnets
    results = []
    for before, after in itertools.product(BACKENDS, BACKENDS):
        with use_backend(before):
            states = operator.selective_scan(*arguments, True, False)[2]
        assert states.shape == (2 * 4 * 3 * 3 * 2,)
        grad, used = torch.ones_like(u), torch.tensor(NAMES.index(after))
        results.append(operator.selective_scan_backward(grad, None, *arguments, states, used))
    for gradients in results[1:]:
        for ours, wanted in zip(gradients, results[0], strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_turning_the_image_turns_the_result(backend):
    """An image that is flipped along both axes, scanned along flipped paths, gives the flipped output."""
    arguments = _arguments(1, 4, 30, 3, 4)
    with use_backend(backend):
        upright = directional_scan(*arguments, True, order=scan_order((5, 6)))
        turned = [x.flip(-1) if i in (0, 1, 3, 4) else x for i, x in enumerate(arguments)]
        # rows backwards are the first direction of the turned image, and so on
        swap = [2, 3, 0, 1]
        turned = [x if i == 0 else x[swap] if i in (2, 5, 6) else x[:, swap] for i, x in enumerate(turned)]
        result = directional_scan(*turned, True, order=scan_order((5, 6)))
    torch.testing.assert_close(result.flip(-1), upright, rtol=1e-11, atol=1e-11)


def test_order_of_vmamba():
    """Rows, columns, and both backwards, of a 2 x 3 image with pixels 0 1 2 / 3 4 5."""
    expected = [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    order = scan_order((2, 3))
    assert order.dtype == torch.int32
    assert order.tolist() == expected
    assert scan_order((2, 3), CROSS_SCAN[1:2]).tolist() == expected[1:2]


@pytest.mark.parametrize("shape", [(7,), (1, 5), (2, 3, 4)])
def test_orders_of_any_dimension_are_paths_along_axes(shape):
    """Every direction visits every voxel once, and its coordinates are sorted by the axes it names."""
    directions = [(axes, back) for axes in itertools.permutations(range(len(shape))) for back in (False, True)]
    order = scan_order(shape, directions)
    for (axes, back), path in zip(directions, order.tolist(), strict=True):
        coordinates = [torch.unravel_index(torch.tensor(index), shape) for index in path]
        keys = [tuple(int(position[axis]) for axis in axes) for position in coordinates]
        assert keys == sorted(keys, reverse=back) and len(set(keys)) == len(keys)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("value", "message"), [(3, "order.1. holds some tokens twice"), (-1, "holds -1"), (12, "holds 12")]
)
def test_orders_that_are_no_permutations_are_refused(backend, value, message):
    """By all backends, which read beyond the image otherwise."""
    order = torch.arange(12, dtype=torch.int32).flip(0).repeat(2, 1)
    order[1, 4] = value
    with use_backend(backend):
        for inference in (False, True):
            with torch.inference_mode(inference), pytest.raises(LightNetsError, match=message):
                directional_scan(*_arguments(1, 3, 12, 4, 2), order=order.clone())


@pytest.mark.parametrize("inference", [False, True])
def test_orders_are_looked_at_once_and_after_each_change(inference, monkeypatch):
    looks = []
    aminmax = torch.Tensor.aminmax
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda x: looks.append(1) or aminmax(x))
    arguments = [x.requires_grad_() for x in _arguments(1, 3, 12, 4, 4)]
    directional_scan(*arguments, order=scan_order((3, 4))).sum().backward()
    assert not looks  # its results are known to be orders
    compiled = torch.compile(
        lambda *x: directional_scan(*x, order=scan_order((3, 4))), fullgraph=True, backend="aot_eager"
    )
    for _ in range(2):
        compiled(*arguments).sum().backward()
    assert not looks  # in a compiled network, too
    order = scan_order((3, 4)).flip(1)
    for _ in range(3):
        directional_scan(*arguments, order=order).sum().backward()
    assert len(looks) == 1
    with torch.inference_mode(inference):
        changing = order.clone()
        directional_scan(*arguments, order=changing)
        changing[0, 0] = 99
        with pytest.raises(LightNetsError, match="holds 99"):
            directional_scan(*arguments, order=changing)


def test_misuse_is_named():
    arguments = _arguments(2, 3, 12, 2, 4)
    order = scan_order((3, 4))
    with pytest.raises(LightNetsError, match=r"order has shape \(2, 12\), expected \(4, 12\)"):
        directional_scan(*arguments, order=order[:2])
    with pytest.raises(LightNetsError, match=r"order is torch\.int64 .* must be torch\.int32"):
        directional_scan(*arguments, order=order.long())
    with pytest.raises(LightNetsError, match=r"delta has shape \(2, 3, 12\), expected \(2, 4, 3, 12\)"):
        directional_scan(arguments[0], arguments[1][:, 0], *arguments[2:], order=order)
    with pytest.raises(LightNetsError, match=r"direction \(0, 0\) must name each of the 2 axes of \(3, 4\) once"):
        scan_order((3, 4), [((0, 0), False)])
