"""What is special to the C kernel of a Mamba layer: threads, instruction sets, processes, its own memory."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from nnunetv2_lightnets.ops import native_library
from nnunetv2_lightnets.ops.mamba_layer import Layer, native
from tests.ops.test_mamba_layer import make

pytestmark = pytest.mark.skipif(native_library.unavailable() is not None, reason="the C library is not there")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "run_length", lambda layer: 64)


def both_passes(layer: Layer) -> tuple[torch.Tensor, ...]:
    """Output and all gradients."""
    with torch.no_grad():
        out, states, moments = native.forward(layer, True)
        grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
        return out, *(x for x in native.backward(layer, grad, states, moments) if x is not None)


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max())


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_results_do_not_depend_on_who_is_faster(batch: int, threads: Callable[[int], None]) -> None:
    """More threads than processors: they are stopped anywhere. Runs of one number of threads are equal to the bit."""
    layer = make(batch, 1000, 24, state=16, dtype=torch.float64)
    threads(1)
    expected = both_passes(layer)
    for count in (2, 3, 8):
        threads(count)
        first, *others = (both_passes(layer) for _ in range(4))
        assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))
        assert torch.equal(first[0], expected[0])
        assert max(map(distance, first, expected)) < 1e-12


def test_threads_of_python_compute_at_once(threads: Callable[[int], None]) -> None:
    layers = [make(2, 500, seed=seed) for seed in range(3)]
    threads(2)
    expected = [both_passes(layer) for layer in layers]
    same: dict[int, list[bool]] = {}

    def repeat(index: int) -> None:
        torch.set_num_threads(2)
        found = [both_passes(layers[index]) for _ in range(5)]
        same[index] = [torch.equal(x, y) for one in found for x, y in zip(one, expected[index], strict=True)]

    workers = [threading.Thread(target=repeat, args=(index,)) for index in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert len(same) == 3 and all(map(all, same.values()))


def _in_child(queue: Any) -> None:
    torch.set_num_threads(2)
    with torch.no_grad():
        queue.put(float(native.forward(make(1, 500), False)[0][0, -1, 0]))


def _detached(layer: Layer) -> dict[str, Any]:
    fields = {name: getattr(layer, name) for name in layer.__dataclass_fields__}
    return {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in fields.items()}


def test_a_forked_process_computes(threads: Callable[[int], None]) -> None:
    """OpenMP's threads do not survive a fork, and would be waited for for ever."""
    threads(2)
    expected = float(both_passes(make(1, 500))[0][0, -1, 0])
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.join(10)
        child.kill()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_instruction_sets_agree(dtype: torch.dtype) -> None:
    """Widths that fill no vector, ranks and states that fill none either."""
    layer = make(2, 200, 20, out=33, state=5, kernel=3, dtype=dtype)
    layer = replace(layer, groups=5)
    found = []
    for name in native_library.instruction_sets():
        native_library.use_instruction_set(name)
        found.append(both_passes(layer))
    native_library.use_instruction_set(native_library.instruction_sets()[0])
    for other in found[1:]:
        assert max(map(distance, found[0], other)) < (1e-5 if dtype == torch.float32 else 1e-12)


def test_numbers_that_are_not_finite_come_out_as_such() -> None:
    layer = make(1, 300)
    with torch.no_grad():
        layer.tokens[0, 100, 0] = float("nan")
    assert both_passes(replace(layer, group_weight=None, group_bias=None))[0][0, 100:].isnan().all()


def test_steps_that_leave_the_range_of_the_exponential() -> None:
    """States forget at once, or stay for ever: exp(dt A) is 0 or 1."""
    layer = make(1, 300, dtype=torch.float64)
    with torch.no_grad():
        layer.A_log[::2] = 8.0
        layer.A_log[1::2] = -40.0
        layer.dt_bias.add_(5)
    single = replace(layer, **{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in _detached(layer).items()})
    assert distance(both_passes(single)[0].double(), both_passes(layer)[0]) < 1e-4


def test_its_memory_is_that_of_runs(threads: Callable[[int], None]) -> None:
    """It grows with the threads, and hardly with the tokens."""
    short, long = make(1, 2**14, 32, state=16), make(1, 2**16, 32, state=16)
    threads(1)
    one = native.workspace(long, True)
    threads(2)
    two = native.workspace(long, True)
    assert native.workspace(long, False) < one < two < 2 * one + 1
    assert two < 1.2 * native.workspace(short, True)
    assert two < long.tokens.nbytes
    with torch.device("meta"):
        shapes = {k: torch.empty_like(v) for k, v in _detached(long).items() if isinstance(v, torch.Tensor)}
    assert native.workspace(replace(long, **shapes), True) == two
