"""Orders are made once for a shape and device, and never handed out where they could be wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnunetv2_lightnets.networks.vss import SS2D
from nnunetv2_lightnets.ops import CROSS_SCAN, directional_scan, scan_order

module: Any = sys.modules["nnunetv2_lightnets.ops.scan_order"]


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    module._kept.clear()
    yield
    module._kept.clear()


class _Calls(TorchDispatchMode):
    """Names of torch's functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_forward_pass_builds_and_checks_no_order_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the order make it wait for a GPU: nothing is read back, and nothing is looked at."""
    looks: list[int] = []
    aminmax = Tensor.aminmax
    monkeypatch.setattr(Tensor, "aminmax", lambda x: looks.append(1) or aminmax(x))
    block, x = SS2D(8, d_state=4), torch.randn(1, 5, 7, 8)
    building_or_waiting = {"arange", "flip", "_local_scalar_dense", "_to_copy"}
    for found in ({"arange", "flip"}, set()):
        with _Calls() as calls:
            block(x).sum().backward()
        assert building_or_waiting & set(calls.names) == found
    assert not looks


def test_equal_calls_share_a_tensor() -> None:
    order = scan_order((3, 4))
    assert scan_order([3, 4], list(CROSS_SCAN), "cpu") is order
    assert scan_order(torch.Size((3, 4)), device=torch.device("cpu")) is order
    assert scan_order((4, 3)) is not order
    assert scan_order((3, 4), CROSS_SCAN[:2]) is not order
    assert scan_order((3, 4), device="meta").is_meta
    with torch.device("meta"):
        assert scan_order((3, 4)).is_meta
    assert scan_order((3, 4)) is order


def test_a_tensor_that_was_written_to_is_not_handed_out_again() -> None:
    order = scan_order((3, 4))
    expected = order.clone()
    for change in (lambda x: x.zero_(), lambda x: x[0, :2].copy_(x[0, :2].flip(0)), lambda x: x.view(-1).fill_(99)):
        order = scan_order((3, 4))
        assert torch.equal(order, expected)
        change(order)
        if order.max() < 12 and order.sum() > 0:  # still a permutation, which a scan may check and take
            directional_scan(*_arguments(), order=order)
    with torch.inference_mode():
        scan_order((3, 4))[0, 0] = 7
    assert torch.equal(scan_order((3, 4)), expected)


def _arguments() -> list[Tensor]:
    """u, delta, A, B, C of a scan of 12 tokens in four directions."""
    shapes = ((1, 2, 12), (1, 4, 2, 12), (4, 2, 3), (1, 4, 3, 12), (1, 4, 3, 12))
    return [-torch.rand(shape) if place == 2 else torch.rand(shape) for place, shape in enumerate(shapes)]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_is_made_without_gradients_serves_a_training(mode: Any) -> None:
    with mode():
        order = scan_order((3, 4))
    arguments = [x.requires_grad_() for x in _arguments()]
    directional_scan(*arguments, order=scan_order((3, 4))).sum().backward()
    assert scan_order((3, 4)) is order and arguments[0].grad is not None


def test_tensors_that_stand_for_others_are_neither_kept_nor_given_away() -> None:
    expected = scan_order((3, 4))
    for clear in (False, True):
        if clear:
            module._kept.clear()
        with FakeTensorMode():
            assert type(scan_order((3, 4))) is not Tensor
        for transform in (torch.func.functionalize, torch.func.grad):
            transform(lambda x: x * scan_order((3, 4)).sum())(torch.ones(()))
        exported = torch.export.export(_Exported(), (torch.ones(12),)).module()
        compiled = torch.compile(_Exported(), fullgraph=True, backend="aot_eager")
        for function in (exported, compiled):
            assert torch.equal(function(torch.arange(12.0)), expected.float())
        assert [order for order, _ in module._kept.values()] == ([] if clear else [expected])
    assert torch.equal(scan_order((3, 4)), expected)


class _Exported(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[scan_order((3, 4)).long()]


def test_a_recorded_cuda_graph_finds_the_order_and_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a CPU's tensors standing for a GPU's."""
    order = scan_order((3, 4))
    monkeypatch.setattr(module, "_can_be_kept", lambda made_here: False)  # as it says while a graph is recorded
    again = scan_order((3, 4))
    assert torch.equal(again, order) and again is not order  # in the graph's own memory
    monkeypatch.undo()

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    place = type("Place", (), {"is_cuda": True})
    monkeypatch.setattr(module, "Tensor", place)
    monkeypatch.setattr(module, "is_functorch_wrapped_tensor", lambda x: False)
    assert not module._can_be_kept(place())


def test_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_KEPT", 3)
    monkeypatch.setattr(module, "_MOST_NUMBERS", 4 * 30)
    orders = [scan_order((side,), [((0,), False)]) for side in (4, 5, 6)]
    assert scan_order((4,), [((0,), False)]) is orders[0]  # now the latest
    scan_order((7,), [((0,), False)])
    assert scan_order((4,), [((0,), False)]) is orders[0]
    assert scan_order((5,), [((0,), False)]) is not orders[1]
    scan_order((4, 7))  # 112 numbers: others have to go
    assert sum(order.numel() for order, _ in module._kept.values()) <= 4 * 30
    large = scan_order((5, 7))
    assert scan_order((5, 7)) is not large and torch.equal(scan_order((5, 7)), large)


def test_threads_may_ask_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_KEPT", 4)
    sides = [side for _ in range(50) for side in range(2, 12)]
    with ThreadPoolExecutor(8) as pool:
        orders = list(pool.map(lambda side: scan_order((side, 3)), sides))
    assert all(torch.equal(order[0], torch.arange(3 * side)) for side, order in zip(sides, orders, strict=True))
    assert len(module._kept) <= 4 + 8


def _sum_in_child(_: int) -> int:
    return int(scan_order((3, 4)).sum())


def test_a_forked_process_finds_them() -> None:
    expected = int(scan_order((3, 4)).sum())
    with get_context("fork").Pool(2) as pool:
        assert pool.map(_sum_in_child, range(4)) == [expected] * 4
