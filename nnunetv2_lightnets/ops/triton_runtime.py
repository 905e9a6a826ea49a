"""What every Triton kernel here needs: whether Triton can compile and run on a GPU, and the one place that launches.

Triton comes with torch for CUDA on Linux. It compiles a kernel when it is first called, and keeps the result on disk
(``TRITON_CACHE_DIR``, else ``~/.triton/cache``). No CUDA toolkit is needed for that, but a C compiler and Python's
headers are, once: for the small library through which Triton calls the driver.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nnunetv2_lightnets.ops.tensors import in_one_line

LEAST_CAPABILITY = (7, 0)  # Volta; what tests compile for


def interpreted() -> bool:
    """Whether Triton interprets kernels with NumPy, which takes tensors on the CPU: for tests, as it is very slow."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def device_type() -> str:
    """Where the kernels' tensors are: "cuda", or "cpu" when kernels are interpreted."""
    return "cpu" if interpreted() else "cuda"


def unavailable(device: int | None = None) -> str | None:
    """Why Triton cannot compile and run kernels on a GPU, None if it can.

    The first call for a GPU compiles a kernel of a few lines and launches it there.

    Args:
        device: Index of the GPU; None for the current one.
    """
    if interpreted():
        return _unimportable()
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _fault(torch.cuda.current_device() if device is None else device)


@cache
def _unimportable() -> str | None:
    try:
        importlib.import_module("nnunetv2_lightnets.ops.triton_trial")
    except Exception as error:  # a broken installation can raise anything; it must not reach users of other backends
        return f"Triton cannot be imported ({in_one_line(error)})"
    return None


@cache
def _fault(device: int) -> str | None:
    if torch.version.hip is not None:
        return "torch is built for ROCm, and these kernels have been written and compiled for NVIDIA's GPUs alone"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} has compute capability {found}; the kernels need {least}"
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed: {_how_to_get_triton()}"
    if reason := _unimportable():
        return reason
    try:
        with torch.cuda.device(device):
            result = importlib.import_module("nnunetv2_lightnets.ops.triton_trial").run(torch.device("cuda", device))
    except Exception as error:  # compilers and drivers raise what they like
        return _explained(error)
    return None if result == 2 * sum(range(64)) else f"a kernel of a few lines gives {result}"


def _how_to_get_triton() -> str:
    system = platform.system()
    if system == "Linux":
        return "it comes with torch for CUDA; pip install triton"
    return f"there is no official build for {system}, where WSL (Windows' Linux) is the way to use it"


def _explained(error: Exception) -> str:
    """What is missing where Triton's driver could not be built, which is the usual cause; else the error."""
    if missing := _missing_for_driver():
        return f"{missing} ({in_one_line(error)})"
    return f"a kernel of a few lines fails ({in_one_line(error)})"


def _missing_for_driver() -> str | None:
    """What Triton's driver is built from and is not on this machine."""
    compiler = os.environ.get("CC")
    if compiler is not None and shutil.which(compiler) is None:
        return f"no C compiler for Triton's driver: CC names {compiler}, which does not exist"
    if compiler is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "no C compiler for Triton's driver: install gcc (apt install gcc, dnf install gcc, conda install gcc)"
    # Debian's Python calls its own scheme "posix_local", and keeps the headers where "posix_prefix" says.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_path("include", scheme))
    if not (headers / "Python.h").is_file():
        return (
            f"no Python headers for Triton's driver: {headers} holds no Python.h; install python3-dev "
            "(apt install python3-dev, dnf install python3-devel)"
        )
    return None


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def on(device: torch.device) -> Any:
    """Context in which kernels are launched: Triton takes the current device, which need not be the tensors'."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def launch(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    """Run a kernel on the current device and its current stream."""
    kernel[(programs,)](**arguments)


def ceil_div(size: int, part: int) -> int:
    """How many parts cover a size."""
    return -(-size // part)
