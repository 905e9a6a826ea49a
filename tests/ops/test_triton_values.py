"""Backend "triton" without a GPU: its kernels, interpreted, against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.ops.triton_process import TritonProcess

pytest.importorskip("triton")

# Largest error relative to the largest value. The interpreter cuts numbers off where it makes bfloat16 of them.
TOLERANCES = {"float64": 1e-13, "float32": 2e-6, "float16": 2**-11, "bfloat16": 2**-7}


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    process = TritonProcess(tmp_path_factory.mktemp("triton"), interpret=True)
    yield process
    process.close()


def _check(errors: dict[str, float], dtype: str) -> None:
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCES[dtype]}
    assert not wrong


def _name(case: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in case.items())


def _case(batch: int, channels: int, length: int, states: int, **more: Any) -> dict[str, Any]:
    return {"batch": batch, "channels": channels, "length": length, "states": states, **more}


FEW = [
    _case(1, 1, 1, 1),
    _case(2, 3, 2, 5, layout="tokens"),
    _case(1, 5, 63, 1, layout="slices", last_state=False),
    _case(1, 4, 6, 16, groups=2, D=False),
    _case(1, 6, 7, 3, groups=3, layout="tokens", z=False),
    _case(1, 3, 5, 2, bias=False, softplus=False),
    _case(1, 2, 5, 4, z=False, bias=False, D=False, softplus=False, last_state=False),
    # More channels than a block of 16: three blocks in turn in one program, and in two programs.
    _case(1, 35, 5, 16, programs=1),
    _case(1, 35, 6, 16, programs=2, layout="tokens"),
    # Three chunks: in three segments; and in one.
    _case(1, 3, 130, 5, run=2),
    _case(1, 3, 130, 5, initial=True),
    _case(2, 2, 7, 3, initial=True, last_state=False, dtype="float32"),
    _case(1, 3, 65, 16, dtype="float32"),
    _case(1, 3, 9, 16, dtype="float16"),
    _case(2, 3, 9, 5, dtype="bfloat16", layout="slices"),
    # Other tiles than the first, which tuning may take; B and C that lie in memory in different ways.
    _case(1, 35, 6, 16, candidate=1, programs=1, dtype="float32"),
    _case(1, 3, 7, 5, candidate=2, layout="tokens"),
    _case(1, 4, 6, 3, groups=2, apart=True),
]
MORE = [
    _case(1, 2, 129, 3, programs=1, z=False),
    _case(1, 3, 130, 5, candidate=2),
    *(
        _case(2, channels, length, states, layout=layout, **flags)
        for channels, length, states, layout, flags in (
            (3, 64, 16, "channels", {"dtype": "float32"}),
            (5, 65, 5, "tokens", {"z": False}),
            (4, 130, 1, "slices", {"groups": 4, "run": 2}),
            (7, 130, 16, "tokens", {"dtype": "float32"}),
            (33, 130, 16, "channels", {"D": False, "programs": 6}),
            (40, 200, 2, "slices", {"groups": 2, "programs": 12, "run": 2}),
            (3, 330, 3, "tokens", {"bias": False, "run": 2}),
            (2, 66, 33, "channels", {"softplus": False}),
        )
    ),
]


@pytest.mark.parametrize("case", FEW, ids=_name)
def test_plain_scan(interpreter: TritonProcess, case: dict[str, Any]) -> None:
    _check(interpreter("scan_errors", kind="plain", **case), case.get("dtype", "float64"))


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize("case", MORE, ids=_name)
def test_plain_scan_larger(interpreter: TritonProcess, case: dict[str, Any]) -> None:
    _check(interpreter("scan_errors", kind="plain", **case), case.get("dtype", "float64"))


@pytest.mark.parametrize(
    "case",
    [
        _case(1, 1, 1, 1, directions=1),
        _case(2, 3, 7, 5, directions=3),
        _case(1, 2, 66, 2, layout="tokens", programs=2),
        _case(1, 18, 5, 16, layout="slices", D=False, programs=1),
        _case(1, 3, 10, 3, bias=False, softplus=False),
        _case(2, 3, 9, 3, initial=True, last_state=False),
        _case(1, 4, 9, 16, dtype="float32", directions=4),
        _case(1, 3, 6, 1, dtype="bfloat16"),
        _case(1, 2, 6, 2, candidate=1, programs=2),
    ],
    ids=_name,
)
def test_directional_scan(interpreter: TritonProcess, case: dict[str, Any]) -> None:
    _check(interpreter("scan_errors", kind="directional", **case), case.get("dtype", "float64"))


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize(
    "case",
    [
        _case(2, 3, 130, 5, directions=4, run=2),
        _case(1, 33, 65, 16, directions=2, dtype="float32", layout="tokens"),
        _case(1, 18, 140, 2, directions=3, layout="slices", programs=12),
    ],
    ids=_name,
)
def test_directional_scan_larger(interpreter: TritonProcess, case: dict[str, Any]) -> None:
    _check(interpreter("scan_errors", kind="directional", **case), case.get("dtype", "float64"))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param({"cut": 71, "programs": 1}, marks=pytest.mark.slow),
        pytest.param({"cut": 129}, marks=pytest.mark.slow),
        pytest.param({"cut": 1}, marks=pytest.mark.slow),
        pytest.param({"cut": 64}, marks=pytest.mark.slow),
    ],
)
def test_a_sequence_in_two_parts(interpreter: TritonProcess, case: dict[str, Any]) -> None:
    sizes = {"batch": 1, "channels": 3, "length": 130, "states": 2}
    _check(interpreter("cut_errors", **sizes, **case), "float64")


def test_states_far_apart_in_memory(interpreter: TritonProcess) -> None:
    """As those of a long sequence with tokens as neighbours: addresses take 64 bits."""
    _check(interpreter("wide_stride_errors"), "float32")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("segments", "given"), [(1, True), (32, False), (33, True), (70, True)])
def test_states_carried_over_segments(interpreter: TritonProcess, segments: int, reverse: bool, given: bool) -> None:
    assert interpreter("start_errors", segments=segments, reverse=reverse, given=given) < 1e-13


def test_extreme_step_sizes(interpreter: TritonProcess) -> None:
    """Step sizes from 1e-13 to 90: none loses its relative accuracy, and none overflows."""
    errors = interpreter("softplus_errors", inputs=[-30.0, -12.0, -7.0, -1.0, 0.0, 0.5, 3.0, 19.9, 20.1, 90.0])
    assert max(errors["float32"]) < 1e-6
    assert max(errors["float64"]) < 1e-14


def test_availability(interpreter: TritonProcess) -> None:
    answer = interpreter("availability")
    assert answer["unavailable"] is None
    taken, wide, integers, elsewhere = answer["refuses"]
    assert taken is None
    assert "256 states" in wide and "300" in wide
    assert "int32" in integers
    assert "meta" in elsewhere


@pytest.mark.parametrize("kind", ["plain", pytest.param("directional", marks=pytest.mark.slow)])
def test_the_probe_believes_these_kernels(interpreter: TritonProcess, kind: str) -> None:
    assert interpreter("probe_fault", kind=kind) is None


def test_named_backend_serves_the_public_function(interpreter: TritonProcess) -> None:
    assert interpreter("public_error") < 1e-13


def test_without_a_gpu_it_says_so_and_does_not_import_triton(tmp_path_factory: pytest.TempPathFactory) -> None:
    process = TritonProcess(tmp_path_factory.mktemp("triton"), interpret=False, hide_gpus=True)
    answer = process("availability")
    process.close()
    assert answer["unavailable"] == "torch sees no CUDA device"
    assert not answer["imported"]
