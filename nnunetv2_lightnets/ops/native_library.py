"""The C library behind the operators' "native" kernels on CPUs (``ops/csrc``): loading it, and its types.

The library is plain C without Python's or torch's headers, called by ctypes on raw pointers: one build serves every
version of both, and the interpreter runs on while it computes. Tensors are described by their strides, so views such as
``x.transpose(1, 2)`` of (B, L, D) memory are read where they lie; channels that are neighbours in memory are fastest.

Arithmetic is in float32, or float64 for float64 inputs; half precision is converted tile by tile (a Mamba layer takes
none). Threads are those of
torch: as many as ``torch.get_num_threads()`` says, and from torch's own OpenMP runtime where it has one.

The environment variable ``NNUNET_LIGHTNETS_NATIVE_ISA`` (avx512, avx2, baseline) forces an instruction set; without it
the best that the processor runs is taken.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.ops.selective_scan.record import CHUNK

LIBRARY = Path(__file__).resolve().parent / "liblightnets.so"
INSTRUCTION_SET_VARIABLE = "NNUNET_LIGHTNETS_NATIVE_ISA"
ABI = 3
"""Number of the interface below; as ``LN_ABI`` in csrc/lightnets.h, and raised with it."""

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_WORTH_HUGE_PAGES = 4 << 20  # bytes; of less, an unaligned tensor may fill no huge page


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


# As in csrc/lightnets.h.
class TensorStruct(ctypes.Structure):
    """``ln_tensor``: strides in elements; ``outer`` is that of directions or groups."""

    _fields_ = (*_fields(ctypes.c_void_p, "data"), *_fields(ctypes.c_int64, "batch outer channel token dtype"))


class ScanStruct(ctypes.Structure):
    """``ln_scan``."""

    _fields_ = (
        *_fields(ctypes.c_int64, "batch directions groups channels length states softplus threads"),
        *_fields(ctypes.c_void_p, "order"),
        *_fields(TensorStruct, "u delta z B C"),
        *_fields(ctypes.c_void_p, "A D delta_bias"),
        *_fields(TensorStruct, "out"),
        *_fields(ctypes.c_void_p, "initial_state last_state checkpoints"),
        *_fields(TensorStruct, "grad_out du ddelta dz dB dC"),
        *_fields(ctypes.c_void_p, "dA dD ddelta_bias"),
    )


class ConvStruct(ctypes.Structure):
    """``ln_conv``."""

    _fields_ = (
        *_fields(ctypes.c_int64, "batch channels length width silu threads"),
        *_fields(TensorStruct, "x y"),
        *_fields(ctypes.c_void_p, "weight bias"),
        *_fields(TensorStruct, "grad_y dx"),
        *_fields(ctypes.c_void_p, "dweight dbias"),
    )


class MambaStruct(ctypes.Structure):
    """``ln_mamba``."""

    _fields_ = (
        *_fields(ctypes.c_int64, "batch length channels inner states rank width outputs groups run threads"),
        *_fields(ctypes.c_double, "group_eps norm_eps"),
        *_fields(
            ctypes.c_void_p, "tokens group_weight group_bias norm_weight norm_bias in_weight conv_weight conv_bias"
        ),
        *_fields(ctypes.c_void_p, "x_weight dt_weight dt_bias A D out_weight skip_scale proj_weight proj_bias"),
        *_fields(ctypes.c_void_p, "out run_states moments grad_out"),
        *_fields(ctypes.c_void_p, "dtokens dgroup_weight dgroup_bias dnorm_weight dnorm_bias din_weight dconv_weight"),
        *_fields(ctypes.c_void_p, "dconv_bias dx_weight ddt_weight ddt_bias dA dD dout_weight dskip_scale"),
        *_fields(ctypes.c_void_p, "dproj_weight dproj_bias"),
    )


@cache
def _load() -> ctypes.CDLL | str:
    """The library with an instruction set chosen, or why there is none."""
    if not LIBRARY.is_file():
        return (
            f"its C library {LIBRARY.name} was not built; install a C compiler (gcc or clang), then this package from "
            f"source: pip install --force-reinstall --no-deps --no-binary nnunetv2-lightnets nnunetv2-lightnets"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"its C library cannot be loaded: {error}"
    reason = _other_interface(library)
    if reason:
        return reason
    library.ln_instruction_set.argtypes = [ctypes.c_int64]
    library.ln_instruction_set.restype = ctypes.c_char_p
    library.ln_choose.argtypes = [ctypes.c_char_p]
    library.ln_use_openmp.argtypes = [ctypes.c_void_p]
    library.ln_use_openmp.restype = None
    library.ln_use_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.ln_use_huge_pages.restype = None
    for name, struct in (("scan", ScanStruct), ("conv", ConvStruct), ("mamba", MambaStruct)):
        for way in ("forward", "backward"):
            function = getattr(library, f"ln_{name}_{way}")
            function.argtypes = [ctypes.POINTER(struct), ctypes.c_int64]
    library.ln_mamba_bytes.argtypes = [ctypes.POINTER(MambaStruct), ctypes.c_int64, ctypes.c_int64]
    library.ln_mamba_bytes.restype = ctypes.c_int64
    library.ln_use_openmp(_openmp_of_torch())
    best = library.ln_instruction_set(0)
    library.ln_choose(best)
    wanted = os.environ.get(INSTRUCTION_SET_VARIABLE, "")
    if wanted and not library.ln_choose(wanted.encode()):
        return f"{INSTRUCTION_SET_VARIABLE} asks for {wanted!r}; this processor and build have {_names(library)}"
    return library


def _other_interface(library: ctypes.CDLL) -> str | None:
    """Why the library was built from other sources than this module's, None if its types are those above.

    An editable install keeps its old library when the sources change.
    """
    expected = [ABI, *(ctypes.sizeof(struct) for struct in (TensorStruct, ScanStruct, ConvStruct, MambaStruct)), CHUNK]
    found: list[int] = []
    if hasattr(library, "ln_abi"):
        numbers = (ctypes.c_int64 * len(expected))()
        library.ln_abi.argtypes = [ctypes.POINTER(ctypes.c_int64), ctypes.c_int64]
        library.ln_abi.restype = None
        library.ln_abi(numbers, len(expected))
        found = list(numbers)
    if found == expected:
        return None
    return (
        f"its C library {LIBRARY} was built from another version of this package (interface {found or 'unknown'}, "
        f"expected {expected}); install the package again, from a source folder by: pip install -e ."
    )


def _openmp_of_torch() -> int | None:
    """Address of GOMP_parallel in the very OpenMP runtime that torch computes with, None where torch has none.

    Symbols of a library are looked up in what it depends on, too, so this finds it whatever its file is called.
    """
    file = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        loaded = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _names(library: ctypes.CDLL) -> str:
    names: list[str] = []
    while name := library.ln_instruction_set(len(names)):
        names.append(name.decode())
    return ", ".join(names)


def instruction_sets() -> list[str]:
    """Instruction sets that this build and processor have, the best first; empty where the library is unavailable."""
    loaded = _load()
    return [] if isinstance(loaded, str) else _names(loaded).split(", ")


def use_instruction_set(name: str) -> None:
    """Compute with one of :func:`instruction_sets` from now on, in the whole process.

    Raises:
        LightNetsError: If there is no such instruction set here.
    """
    if not library().ln_choose(name.encode()):
        raise LightNetsError(f"native: there is no instruction set {name!r} here; use one of {_names(library())}")


def unavailable() -> str | None:
    """Why the library cannot be used on this machine, None if it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def library() -> ctypes.CDLL:
    """The library.

    Raises:
        LightNetsError: If it cannot be used here.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise LightNetsError(f"the native backend is not available: {loaded}")
    return loaded


def unreadable(names: tuple[str, ...], tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why the library cannot read one of the tensors, None if it can."""
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None:
            continue
        if not tensor.is_cpu:
            return f"{name} is on {tensor.device}, and it computes on CPUs"
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, and it reads float32, float64, bfloat16 and float16"
        if tensor.layout != torch.strided:
            return f"{name} is {tensor.layout}, and it reads dense tensors"
    return None


def describe(x: Tensor | None, outer: bool = False) -> TensorStruct:
    """``x`` as (B, D, L), or with ``outer`` (B, K or G, ..., L)."""
    if x is None:
        return TensorStruct()
    strides = x.stride()
    if outer:
        return TensorStruct(x.data_ptr(), *strides, DTYPES[x.dtype])
    return TensorStruct(x.data_ptr(), strides[0], 0, strides[1], strides[2], DTYPES[x.dtype])


def pointer(x: Tensor | None) -> int | None:
    """Address of the numbers of a dense tensor."""
    return None if x is None else x.data_ptr()


def new_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A result in the memory layout of ``x``, in huge pages where the system has them."""
    result = torch.empty_like(x, dtype=dtype)
    if result.nbytes >= _WORTH_HUGE_PAGES:
        library().ln_use_huge_pages(result.data_ptr(), result.nbytes)
    return result


def resolved(x: Tensor) -> Tensor:
    """``x`` without the lazy conjugation or negation that raw memory does not show."""
    return x.resolve_conj().resolve_neg()


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as dense numbers in ``dtype``; for what is small, so that a copy costs nothing."""
    return resolved(x).to(dtype).contiguous()


def check_status(status: int) -> None:
    """Raise what a call of the library ended with."""
    if status:
        raise MemoryError("the native backend ran out of memory")
