"""Backend "native": the selective scan and the causal convolution on CPUs, in C (``ops/csrc``).

The library is plain C without Python's or torch's headers, called by ctypes on raw pointers: one build serves every
version of both, and the interpreter runs on while a scan does. Tensors are described by their strides, so views such as
``x.transpose(1, 2)`` of (B, L, D) memory are read where they lie; channels that are neighbours in memory are fastest.
Everything that could make C read outside a tensor is checked here first.

Arithmetic is in float32, or float64 for float64 inputs; half precision is converted tile by tile. Threads are those of
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
from nnunetv2_lightnets.ops.selective_scan.layout import CHUNK, compute_dtype, n_chunks

NAME = "native"
LIBRARY = Path(__file__).resolve().parent.parent / "liblightnets.so"
INSTRUCTION_SET_VARIABLE = "NNUNET_LIGHTNETS_NATIVE_ISA"
WIDEST_KERNEL = CHUNK + 1  # of the convolution: its tiles overlap by one chunk at most

_WORTH_HUGE_PAGES = 4 << 20  # bytes; of less, an unaligned tensor may fill no huge page

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class _Tensor(ctypes.Structure):
    """``ln_tensor``: strides in elements; ``outer`` is that of directions or groups."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("outer", ctypes.c_int64),
        ("channel", ctypes.c_int64),
        ("token", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


def _struct(name: str, *fields: str) -> type[ctypes.Structure]:
    """A structure from "name" (int64), "name*" (pointer) and "name[]" (ln_tensor)."""
    types: list[tuple[str, type]] = []
    for field in fields:
        if field.endswith("*"):
            types.append((field[:-1], ctypes.c_void_p))
        elif field.endswith("[]"):
            types.append((field[:-2], _Tensor))
        else:
            types.append((field, ctypes.c_int64))
    return type(name, (ctypes.Structure,), {"_fields_": types})


# As in csrc/lightnets.h.
_Scan = _struct(
    "_Scan",
    *("batch", "directions", "groups", "channels", "length", "states", "softplus", "threads", "order*"),
    *("u[]", "delta[]", "z[]", "B[]", "C[]", "A*", "D*", "delta_bias*", "out[]", "last_state*", "checkpoints*"),
    *("grad_out[]", "du[]", "ddelta[]", "dz[]", "dB[]", "dC[]", "dA*", "dD*", "ddelta_bias*"),
)
_Conv = _struct(
    "_Conv",
    *("batch", "channels", "length", "width", "silu", "threads", "x[]", "y[]", "weight*", "bias*"),
    *("grad_y[]", "dx[]", "dweight*", "dbias*"),
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
    library.ln_instruction_set.argtypes = [ctypes.c_int64]
    library.ln_instruction_set.restype = ctypes.c_char_p
    library.ln_choose.argtypes = [ctypes.c_char_p]
    library.ln_use_openmp.argtypes = [ctypes.c_void_p]
    library.ln_use_openmp.restype = None
    library.ln_use_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.ln_use_huge_pages.restype = None
    for name, struct in (("scan", _Scan), ("conv", _Conv)):
        for way in ("forward", "backward"):
            function = getattr(library, f"ln_{name}_{way}")
            function.argtypes = [ctypes.POINTER(struct), ctypes.c_int64]
    library.ln_use_openmp(_openmp_of_torch())
    best = library.ln_instruction_set(0)
    library.ln_choose(best)
    wanted = os.environ.get(INSTRUCTION_SET_VARIABLE, "")
    if wanted and not library.ln_choose(wanted.encode()):
        return f"{INSTRUCTION_SET_VARIABLE} asks for {wanted!r}; this processor and build have {_names(library)}"
    return library


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
    """Instruction sets that this build and processor have, the best first; empty where the backend is unavailable."""
    library = _load()
    return [] if isinstance(library, str) else _names(library).split(", ")


def use_instruction_set(name: str) -> None:
    """Compute with one of :func:`instruction_sets` from now on, in the whole process.

    Raises:
        LightNetsError: If there is no such instruction set here.
    """
    library = _library()
    if not library.ln_choose(name.encode()):
        raise LightNetsError(f"native: there is no instruction set {name!r} here; use one of {_names(library)}")


def unavailable() -> str | None:
    """Why the library cannot be used on this machine, None if it can."""
    library = _load()
    return library if isinstance(library, str) else None


def _library() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        raise LightNetsError(f"the native backend is not available: {library}")
    return library


def refuses(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> str | None:
    """Why the kernel cannot take this call, None if it can; the arguments of a plain or a directional scan."""
    arguments = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    return _unreadable(arguments) or _misshapen(u, delta, A, B, C, D, z, delta_bias)


def _unreadable(arguments: dict[str, Tensor | None]) -> str | None:
    for name, tensor in arguments.items():
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}, and it computes on CPUs"
        if tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}, and it reads float32, float64, bfloat16 and float16"
        if tensor.layout != torch.strided:
            return f"{name} is {tensor.layout}, and it reads dense tensors"
    return None


def _misshapen(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> str | None:
    """A directional scan is told from a plain one by ``delta``, (B, K, D, L) instead of (B, D, L)."""
    if u.dim() != 3:
        return f"u has shape {tuple(u.shape)}, and it takes (B, D, L)"
    batch, channels, length = u.shape
    directions = (delta.shape[1],) if delta.dim() == 4 else ()
    states = A.shape[-1] if A.dim() else 0
    if states == 0:
        return "A has no states"
    outer = directions[0] if directions else B.shape[1] if B.dim() == 4 else 0
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("delta", delta, (batch, *directions, channels, length)),
        ("A", A, (*directions, channels, states)),
        ("B", B, (batch, outer, states, length)),
        ("C", C, (batch, outer, states, length)),
        ("D", D, (*directions, channels)),
        ("z", z, (batch, channels, length)),
        ("delta_bias", delta_bias, (*directions, channels)),
    ]
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            return f"{name} has shape {tuple(tensor.shape)}, and it takes {shape}"
    if directions and z is not None:
        return "a directional scan has no gate z"
    if outer == 0 or (not directions and channels % outer):
        return f"B has {outer} groups for {channels} channels"
    return None


def _describe(x: Tensor | None, outer: bool = False) -> _Tensor:
    """``x`` as (B, D, L), or with ``outer`` (B, K or G, ..., L)."""
    if x is None:
        return _Tensor()
    strides = x.stride()
    if outer:
        return _Tensor(x.data_ptr(), *strides, _DTYPES[x.dtype])
    return _Tensor(x.data_ptr(), strides[0], 0, strides[1], strides[2], _DTYPES[x.dtype])


def _new(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A result in the memory layout of ``like``, in huge pages where the system has them."""
    x = torch.empty_like(like, dtype=dtype)
    if x.nbytes >= _WORTH_HUGE_PAGES:
        _library().ln_use_huge_pages(x.data_ptr(), x.nbytes)
    return x


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _plain(x: Tensor) -> Tensor:
    """``x`` without the lazy conjugation or negation that raw memory does not show."""
    return x.resolve_conj().resolve_neg()


def _parameter(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``x`` as dense numbers in the compute dtype; small, so that a copy costs nothing."""
    return None if x is None else _plain(x).to(dtype).contiguous()


class _Call:
    """Arguments of one scan in the form that C takes, which keeps the tensors behind the pointers alive."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        order: Tensor | None = None,
    ) -> None:
        self.library = _library()
        refusal = refuses(u, delta, A, B, C, D, z, delta_bias)
        if refusal is None and (delta.dim() == 4) != (order is not None):
            refusal = f"delta has shape {tuple(delta.shape)}, and (B, K, D, L) needs an order"
        if refusal:
            raise LightNetsError(f"native selective scan: {refusal}")
        self.dtype = compute_dtype(u)
        directional = order is not None
        self.u, self.delta, self.B, self.C = (_plain(x) for x in (u, delta, B, C))
        self.z = None if z is None else _plain(z)
        self.A, self.D, self.delta_bias = (_parameter(x, self.dtype) for x in (A, D, delta_bias))
        self.batch, self.channels, self.length = u.shape
        self.directions = delta.shape[1] if directional else 1
        self.states = A.shape[-1]
        self.order = order
        if order is not None:
            shape = (self.directions, self.length)
            if order.shape != shape or order.dtype != torch.int32 or order.device.type != "cpu":
                raise LightNetsError(
                    f"native directional scan: order is {order.dtype} {tuple(order.shape)} on {order.device}; "
                    f"it must be torch.int32 {shape} on the CPU"
                )
            self.order = order.contiguous()
        self.arguments = _Scan(
            batch=self.batch,
            directions=self.directions,
            groups=1 if directional else B.shape[1],
            channels=self.channels,
            length=self.length,
            states=self.states,
            softplus=delta_softplus,
            threads=torch.get_num_threads(),
            order=_pointer(self.order),
            u=_describe(self.u),
            delta=_describe(self.delta, outer=directional),
            z=_describe(self.z),
            B=_describe(self.B, outer=True),
            C=_describe(self.C, outer=True),
            A=_pointer(self.A),
            D=_pointer(self.D),
            delta_bias=_pointer(self.delta_bias),
        )

    def checkpoints(self) -> int:
        """Numbers in the states saved at the start of every chunk."""
        return self.batch * self.directions * n_chunks(self.length) * self.channels * self.states

    def forward(self, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
        out = _new(self.u)
        states = torch.empty(self.checkpoints() if save_states else 0, dtype=self.dtype)
        last_state = torch.empty(self.batch, self.channels, self.states, dtype=self.dtype)
        arguments = self.arguments
        arguments.out = _describe(out)
        arguments.checkpoints = _pointer(states if save_states else None)
        arguments.last_state = _pointer(None if self.order is not None else last_state)
        _check(self.library.ln_scan_forward(ctypes.byref(arguments), _DTYPES[self.dtype]))
        return out, last_state, states

    def backward(
        self, grad_out: Tensor, grad_last_state: Tensor | None, states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        refusal = _unreadable({"grad_out": grad_out, "grad_last_state": grad_last_state, "states": states})
        if refusal is None and grad_out.shape != self.u.shape:
            refusal = f"grad_out has shape {tuple(grad_out.shape)}, and u has {tuple(self.u.shape)}"
        shape = (self.batch, self.channels, self.states)
        if refusal is None and grad_last_state is not None and grad_last_state.shape != shape:
            refusal = f"grad_last_state has shape {tuple(grad_last_state.shape)}, and it takes {shape}"
        if refusal is None and (states.numel() != self.checkpoints() or states.dtype != self.dtype):
            refusal = f"states hold {states.numel()} x {states.dtype}, and it takes {self.checkpoints()} x {self.dtype}"
        if refusal:
            raise LightNetsError(f"native selective scan, backward: {refusal}")
        grad_out, states = _plain(grad_out), states.contiguous()
        grad_last_state = _parameter(grad_last_state, self.dtype)
        outer = self.order is not None
        du, ddelta = _new(self.u), _new(self.delta)
        dB, dC = _new(self.B, self.dtype), _new(self.C, self.dtype)
        dA = torch.empty_like(self.A) if self.A is not None else None
        dz, dD, dbias = (None if x is None else _new(x) for x in (self.z, self.D, self.delta_bias))
        arguments = self.arguments
        arguments.grad_out = _describe(grad_out)
        arguments.last_state = _pointer(grad_last_state)
        arguments.checkpoints = _pointer(states)
        arguments.du, arguments.ddelta, arguments.dz = _describe(du), _describe(ddelta, outer), _describe(dz)
        arguments.dB, arguments.dC = _describe(dB, True), _describe(dC, True)
        arguments.dA, arguments.dD, arguments.ddelta_bias = _pointer(dA), _pointer(dD), _pointer(dbias)
        _check(self.library.ln_scan_backward(ctypes.byref(arguments), _DTYPES[self.dtype]))
        assert dA is not None
        return du, ddelta, dA, dB.to(self.B.dtype), dC.to(self.C.dtype), dD, dz, dbias


def _check(status: int) -> None:
    if status == 1:
        raise MemoryError("the native backend ran out of memory")
    if status == 2:
        raise LightNetsError("directional scan: a row of order is no permutation of range(L); make it by scan_order")


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, D, L), last state (B, D, N) and the states at the start of every chunk (flat)."""
    return _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus).forward(save_states)


def backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    states: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias; states inside a chunk are computed again."""
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return call.backward(grad_out, grad_last_state, states)


def directional_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: Tensor,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    """Output (B, D, L) in image order and the states at the start of every chunk of every direction (flat)."""
    out, _, states = _Call(u, delta, A, B, C, D, None, delta_bias, delta_softplus, order).forward(save_states)
    return out, states


def directional_backward(
    grad_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: Tensor,
    states: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D and delta_bias, in image order."""
    call = _Call(u, delta, A, B, C, D, None, delta_bias, delta_softplus, order)
    du, ddelta, dA, dB, dC, dD, _, dbias = call.backward(grad_y, None, states)
    return du, ddelta, dA, dB, dC, dD, dbias


def conv_refuses(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernel cannot take this causal convolution, None if it can."""
    refusal = _unreadable({"x": x, "weight": weight, "bias": bias})
    if refusal is None and x.dim() != 3:
        refusal = f"x has shape {tuple(x.shape)}, and it takes (B, D, L)"
    if refusal is None and (weight.dim() != 2 or weight.shape[0] != x.shape[1]):
        refusal = f"weight has shape {tuple(weight.shape)}, and it takes ({x.shape[1]}, K)"
    if refusal is None and not 1 <= weight.shape[1] <= WIDEST_KERNEL:
        refusal = f"weight has shape {tuple(weight.shape)}, and it takes 1 to {WIDEST_KERNEL} taps"
    if refusal is None and bias is not None and bias.shape != (x.shape[1],):
        refusal = f"bias has shape {tuple(bias.shape)}, and it takes ({x.shape[1]},)"
    return refusal


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> ctypes.Structure:
    refusal = conv_refuses(x, weight, bias)
    if refusal:
        raise LightNetsError(f"native causal_conv1d: {refusal}")
    batch, channels, length = x.shape
    return _Conv(
        batch=batch,
        channels=channels,
        length=length,
        width=weight.shape[1],
        silu=silu,
        threads=torch.get_num_threads(),
        x=_describe(x),
        weight=_pointer(weight),
        bias=_pointer(bias),
    )


def causal_conv1d_forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Depthwise causal convolution, then SiLU if asked for.

    Args:
        x: (B, D, L), any strides; the output keeps its dtype and memory layout.
        weight: (D, K); ``weight[:, -1]`` meets the token itself.
        bias: (D,).
        silu: Whether to apply SiLU.

    Returns:
        (B, D, L).

    Raises:
        LightNetsError: If the backend is not available or does not take the call.
    """
    library, dtype = _library(), compute_dtype(x)
    x = _plain(x)
    dense_weight, dense_bias = _parameter(weight, dtype), _parameter(bias, dtype)
    assert dense_weight is not None
    arguments = _conv(x, dense_weight, dense_bias, silu)
    y = _new(x)
    arguments.y = _describe(y)
    _check(library.ln_conv_forward(ctypes.byref(arguments), _DTYPES[dtype]))
    return y


def causal_conv1d_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias (None where the bias is None), each in the dtype of its argument.

    Args:
        grad_y: Gradient of the output, (B, D, L).
        x: As in :func:`causal_conv1d_forward`, as are the others.
        weight: (D, K).
        bias: (D,).
        silu: Whether SiLU was applied.

    Raises:
        LightNetsError: If the backend is not available or does not take the call.
    """
    library, dtype = _library(), compute_dtype(x)
    x, grad_y = _plain(x), _plain(grad_y)
    dense_weight, dense_bias = _parameter(weight, dtype), _parameter(bias, dtype)
    assert dense_weight is not None
    arguments = _conv(x, dense_weight, dense_bias, silu)
    refusal = _unreadable({"grad_y": grad_y})
    if refusal is None and grad_y.shape != x.shape:
        refusal = f"grad_y has shape {tuple(grad_y.shape)}, and x has {tuple(x.shape)}"
    if refusal:
        raise LightNetsError(f"native causal_conv1d, backward: {refusal}")
    dx, dweight = _new(x), torch.empty_like(dense_weight)
    dbias = None if dense_bias is None else torch.empty_like(dense_bias)
    arguments.grad_y, arguments.dx = _describe(grad_y), _describe(dx)
    arguments.dweight, arguments.dbias = _pointer(dweight), _pointer(dbias)
    _check(library.ln_conv_backward(ctypes.byref(arguments), _DTYPES[dtype]))
    return dx, dweight.to(weight.dtype), dbias if bias is None or dbias is None else dbias.to(bias.dtype)
