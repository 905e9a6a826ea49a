"""Why Triton cannot run: every cause has a name, and where something can be installed, that is named, too."""

from __future__ import annotations

import platform
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nnunetv2_lightnets.ops import triton_runtime


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine with a GPU on which everything works but what a test takes away."""
    trial = SimpleNamespace(run=lambda device: 2 * sum(range(64)))
    monkeypatch.setattr(triton_runtime, "interpreted", lambda: False)
    monkeypatch.setattr(triton_runtime.importlib, "import_module", lambda name: trial)
    monkeypatch.setattr(triton_runtime.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: memoryview(b""))  # any context manager
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla K80")
    for cached in (triton_runtime._fault, triton_runtime._unimportable):
        cached.cache_clear()
    yield monkeypatch
    for cached in (triton_runtime._fault, triton_runtime._unimportable):
        cached.cache_clear()


def _failing(gpu: pytest.MonkeyPatch, error: Exception) -> None:
    def run(device: torch.device) -> int:
        raise error

    gpu.setattr(triton_runtime.importlib, "import_module", lambda name: SimpleNamespace(run=run))


def test_it_works(gpu: pytest.MonkeyPatch) -> None:
    assert triton_runtime.unavailable() is None


def test_without_a_gpu(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_runtime.unavailable() == "torch sees no CUDA device"


def test_amd(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in str(triton_runtime.unavailable())


def test_an_old_gpu_is_named_with_what_is_needed(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (3, 7))
    assert triton_runtime.unavailable() == "Tesla K80 has compute capability 3.7; the kernels need 7.0"


def test_every_gpu_is_looked_at_by_itself(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (3, 7) if device else (9, 0))
    assert triton_runtime.unavailable(0) is None
    assert "3.7" in str(triton_runtime.unavailable(1))


@pytest.mark.parametrize(("system", "remedy"), [("Linux", "pip install triton"), ("Windows", "WSL")])
def test_without_triton(gpu: pytest.MonkeyPatch, system: str, remedy: str) -> None:
    gpu.setattr(triton_runtime.importlib.util, "find_spec", lambda name: None)
    gpu.setattr(platform, "system", lambda: system)
    reason = str(triton_runtime.unavailable())
    assert "Triton is not installed" in reason and remedy in reason


def test_a_broken_triton(gpu: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libtriton.so: undefined symbol\nand more")

    gpu.setattr(triton_runtime.importlib, "import_module", broken)
    assert triton_runtime.unavailable() == "Triton cannot be imported (OSError: libtriton.so: undefined symbol)"


def test_without_a_compiler_the_package_is_named(gpu: pytest.MonkeyPatch) -> None:
    _failing(gpu, RuntimeError("Failed to find C compiler. Please specify via CC environment variable"))
    gpu.delenv("CC", raising=False)
    gpu.setattr(shutil, "which", lambda name: None)
    reason = str(triton_runtime.unavailable())
    assert reason.startswith("no C compiler for Triton's driver: install gcc") and "Failed to find" in reason


def test_a_compiler_that_does_not_exist(gpu: pytest.MonkeyPatch) -> None:
    _failing(gpu, FileNotFoundError("icc"))
    gpu.setenv("CC", "/opt/icc")
    assert "CC names /opt/icc" in str(triton_runtime.unavailable())


def test_without_python_headers(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _failing(gpu, RuntimeError("Command '['/usr/bin/gcc', ...]' returned non-zero exit status 1."))
    gpu.delenv("CC", raising=False)
    gpu.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    gpu.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    assert "install python3-dev" in str(triton_runtime.unavailable())


def test_any_other_error_is_told_in_one_line(gpu: pytest.MonkeyPatch) -> None:
    _failing(gpu, RuntimeError("PTX JIT compilation failed\nlog:\n..."))
    gpu.setattr(triton_runtime, "_missing_for_driver", lambda: None)
    assert triton_runtime.unavailable() == "a kernel of a few lines fails (RuntimeError: PTX JIT compilation failed)"


def test_a_kernel_that_computes_nothing(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(triton_runtime.importlib, "import_module", lambda name: SimpleNamespace(run=lambda device: 2016))
    assert triton_runtime.unavailable() == "a kernel of a few lines gives 2016"
