"""The causal convolution's Triton kernels without a GPU: values in the interpreter, and compilation for several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nnunetv2_lightnets.ops import causal_conv1d_triton as by_triton
from tests.ops.triton_process import TritonProcess

pytest.importorskip("triton.backends.nvidia")
WORKER = "triton_conv_worker.py"
# Largest error relative to the largest value. The interpreter cuts numbers off where it makes bfloat16 of them.
TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "float16": 2**-11, "bfloat16": 2**-7}
CAPABILITIES = [70, 75, 80, 86, 89, 90, 100, 120]


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    process = TritonProcess(tmp_path_factory.mktemp("triton"), interpret=True, worker=WORKER)
    yield process
    process.close()


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    process = TritonProcess(tmp_path_factory.mktemp("triton"), interpret=False, hide_gpus=True, worker=WORKER)
    yield process
    process.close()


def _check(errors: dict[str, float], tolerance: float) -> None:
    assert errors
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}  # written so that NaN fails
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["channels", "slices", "tokens", "strided", "expanded"])
def test_equals_torchs_operations_in_float64(interpreter: TritonProcess, dtype: str, layout: str) -> None:
    """Two blocks of channels and of tokens, the last ones not full."""
    size = {"channels": 5, "length": 270} if layout in ("tokens", "expanded") else {"channels": 70, "length": 40}
    _check(interpreter("errors", batch=1, width=4, dtype=dtype, layout=layout, **size), TOLERANCE[dtype])


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("layout", ["channels", "tokens"])
def test_any_kernel_size(interpreter: TritonProcess, width: int, layout: str) -> None:
    case = {"batch": 2, "channels": 3, "length": 40, "width": width, "layout": layout}
    _check(interpreter("errors", **case, grad_layout="tokens"), 1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 31, 32, 33])
def test_any_length(interpreter: TritonProcess, length: int) -> None:
    """Shorter than the kernel, and about the size of a block."""
    for layout in ("channels", "tokens"):
        _check(interpreter("errors", batch=2, channels=3, length=length, width=4, layout=layout), 1e-12)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_with_and_without_bias_and_silu(interpreter: TritonProcess, silu: bool, bias: bool) -> None:
    _check(interpreter("errors", batch=2, channels=5, length=50, width=4, silu=silu, bias=bias), 1e-12)


@pytest.mark.parametrize("layout", ["channels", "tokens"])
@pytest.mark.parametrize("tile", range(4))
def test_every_tile(interpreter: TritonProcess, layout: str, tile: int) -> None:
    """Several programs, and in the backward pass several tiles for each of them."""
    case = {"batch": 1, "channels": 2, "width": 4, "layout": layout, "tile": tile, "programs": 2}
    _check(interpreter("errors", length=130 if layout == "channels" else 520, **case), 1e-12)


@pytest.mark.parametrize("axis", range(3))
def test_strides_beyond_32_bits(interpreter: TritonProcess, axis: int) -> None:
    _check(interpreter("wide_stride_errors", axis=axis), 1e-5)


def test_gradients_are_the_same_to_the_last_bit(interpreter: TritonProcess) -> None:
    assert interpreter("same_bits")


def test_forcing_triton_forces_its_convolution(interpreter: TritonProcess) -> None:
    found = interpreter("public_errors", backend="triton")
    assert found.pop("launches") == ["conv_forward_kernel", "conv_backward_kernel"]
    _check(found, 1e-12)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_forcing_another_backend_launches_nothing(interpreter: TritonProcess, backend: str) -> None:
    assert interpreter("public_errors", backend=backend)["launches"] == []


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("nothing", None),
        ("output", "of a small call, its output is wrong"),
        ("dx", "of a small call, its dx is wrong"),
        ("dweight", "of a small call, its dweight is wrong"),
        ("dbias", "of a small call, its dbias is wrong"),
        ("error", "it fails on a small call (RuntimeError: no kernel image is available)"),
    ],
)
def test_kernels_are_taken_only_where_all_they_give_is_right(
    interpreter: TritonProcess, spoil: str, reason: str | None
) -> None:
    assert interpreter("probe", spoil=spoil) == reason


def test_what_the_kernels_take(interpreter: TritonProcess) -> None:
    wanted = {"usual": True, "wide kernel": False, "integers": False, "elsewhere": False}
    assert interpreter("taken") == wanted


def test_without_a_gpu_nothing_is_taken() -> None:
    device = torch.device("cpu")
    assert by_triton.unavailable(device) == "takes tensors on cuda, not on cpu"
    assert not by_triton.takes(torch.ones(1, 2, 3), torch.ones(2, 4))


# ---------------------------------------------------------------------------------------------------- compiled kernels


def _compile(compiler: TritonProcess, capabilities: list[int], **case: Any) -> None:
    """Two kernels with four tiles each, which spill no registers: these would lie on the stack."""
    found = compiler("resources", capabilities=capabilities, batch=2, length=262_144, width=4, **case)
    assert len(found) == 2 * 4 * len(capabilities)
    assert not [x for x in found if x["stack"]]
    assert max(x["registers"] for x in found) <= 255


def test_no_registers_are_spilled(compiler: TritonProcess) -> None:
    _compile(compiler, [80], channels=512, dtype="float32", layout="channels")


@pytest.mark.slow
@pytest.mark.by_hand
@pytest.mark.parametrize(
    ("capabilities", "dtype", "layout", "channels"),
    [
        (CAPABILITIES, "float32", "channels", 512),
        ([75, 90, 120], "bfloat16", "slices", 128),
        ([75, 90, 120], "float16", "tokens", 64),
    ],
)
def test_no_registers_are_spilled_on_any_gpu(
    compiler: TritonProcess, capabilities: list[int], dtype: str, layout: str, channels: int
) -> None:
    _compile(compiler, capabilities, channels=channels, dtype=dtype, layout=layout)
