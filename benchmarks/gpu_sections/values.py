"""Section a: is everything right? Operators against float64 on a CPU, networks against a CPU in float32.

An error is the largest difference, relative to the largest value of the tensor; of a network's gradients, the norm of
the difference relative to the norm of all. ``worst`` is the gradient that it belongs to. Inputs of a row are rounded to
its dtype before the float64 reference sees them, and memory that nobody writes holds NaN.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gpu_sections.bench import Bench, Table, captured
from gpu_sections.operators import CHOSEN, Case, Convolution, Norm, Scan
from nnunetv2_lightnets.errors import LightNetsError
from nnunetv2_lightnets.networks import create_network, list_networks, prepare_for_inference
from nnunetv2_lightnets.ops import available_backends, directional_scan, use_backend

TABLE = Table(
    "values.csv",
    ("operator", "case", "way", "dtype"),
    ("output error", "gradient error", "worst", "tolerance", "ok"),
)
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}  # of operators, as in their tests
CASES: tuple[Case, ...] = (
    Scan(1, 64, 2_049),
    Scan(2, 24, 120, image=(10, 12)),
    Scan(2, 35, 300, gate=True),
    Convolution(2, 64, 1_025),
    Norm(2, 64, 4_096),
    Scan(2, 32, 500, gate=True, state=True),
    Scan(2, 32, 700, layout="slices"),
    Scan(2, 32, 700, layout="columns", groups=2),
    Scan(1, 96, 400, image=(20, 20), layout="columns", shuffled=True),
    Convolution(2, 64, 1_025, layout="slices"),
    Convolution(2, 64, 1_025, layout="columns"),
    Scan(1, 8, 65_539),
    Scan(1, 768, 400, image=(20, 20)),
    Norm(1, 32, 65_536),
)
TOY_CASES: tuple[Case, ...] = (
    Scan(1, 8, 20),
    Scan(1, 8, 12, image=(3, 4), shuffled=True),
    Scan(1, 4, 10, gate=True, state=True, layout="slices"),
    Convolution(1, 8, 17),
    Norm(1, 8, 33),
)
# Ways to run a network, the largest errors that they may have in the output and in the gradient, and expected seconds.
# Mixed precision moves inputs over the kinks of poolings and rectifiers, which changes the gradient of random weights a
# lot: there only its order of magnitude is judged.
NETWORK_WAYS: dict[str, tuple[float, float | None, int]] = {
    "float32": (1e-3, 1e-2, 6),
    "AMP": (1e-1, 10, 6),
    "prediction": (1e-3, None, 4),
    "compiled": (1e-3, 1e-2, 60),
    "AMP, compiled": (1e-1, 10, 60),
}
TO_COMPILE = (("lightm_unet", 3), ("swin_umamba_d", 2), ("ulite", 3))
_SCALE = 1024.0  # of a loss in float16, as a gradient scaler has it


def run(bench: Bench) -> None:
    """Measure the rows, the most telling ones first."""
    cases = TOY_CASES if bench.toy else CASES
    compare_cases(bench, cases, "float32")
    refuse_a_wrong_order(bench)
    compare_networks(bench, "float32")
    capture(bench)
    compare_networks(bench, "AMP")
    for dtype in ("bfloat16", "float16"):
        compare_cases(bench, cases[:3] if bench.toy else cases, dtype)
    compare_networks(bench, "prediction")
    compare_cases(bench, cases[:1] if bench.toy else cases, "float64")
    if bench.toy:
        return compare_networks(bench, "compiled", (("ulite", 2),))
    for networks in (TO_COMPILE, tuple(key for key in all_networks() if key not in TO_COMPILE)):
        for way in ("AMP, compiled", "compiled"):
            compare_networks(bench, way, networks)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference by largest value; NaN where anything is NaN."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).abs().max() / wanted.abs().max())


def judged(output: float, gradient: float | None, worst: str, tolerances: Sequence[float | None]) -> dict[str, Any]:
    """Values of a row. NaN is never right."""
    pairs = [(output, tolerances[0])] if gradient is None else list(zip((output, gradient), tolerances, strict=True))
    right = all(limit is not None and error <= limit for error, limit in pairs)
    return {
        "output error": f"{output:.2g}",
        "gradient error": None if gradient is None else f"{gradient:.2g}",
        "worst": worst,
        "tolerance": " / ".join(f"{limit:.2g}" for _, limit in pairs),
        "ok": "yes" if right else "no",
    }


# ---- Operators ----


def compare_cases(bench: Bench, cases: Sequence[Case], dtype: str) -> None:
    """Rows of all backends in one dtype."""
    for case in cases:
        for way in case.backends(bench.device):
            names = (case.operator, str(case), way, dtype)
            bench.rows.measure(names, partial(compare, case, way, dtype, bench.device), 6)


def compare(case: Case, way: str, dtype: str, device: torch.device) -> dict[str, Any]:
    """One row: outputs and all gradients against those of float64."""
    inputs = case.inputs(DTYPES[dtype], device, CPU)
    wanted = results(case, [x.cpu().double() for x in inputs], reference(case))
    results(case, inputs, way)  # compiles, and chooses by measurement, which poisoning would disturb
    with poisoned_memory():
        found = results(case, inputs, way)
    errors = [relative_error(x, y) for x, y in zip(found, wanted, strict=True)]
    n_outputs = len(errors) - len(inputs)
    gradients = dict(zip(case.names, errors[n_outputs:], strict=True))
    worst = max(gradients, key=lambda name: (gradients[name] != gradients[name], gradients[name]))  # NaN first
    tolerance = TOLERANCE[dtype]
    return judged(max(errors[:n_outputs]), gradients[worst], f"d{worst}", (tolerance, tolerance))


def results(case: Case, inputs: Sequence[Tensor], way: str) -> list[Tensor]:
    """Outputs, then the gradients of all inputs for random ones of the outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with nullcontext() if way == CHOSEN else use_backend(way):
        outputs = case.compute(leaves)
        generator = torch.Generator().manual_seed(2)
        grads = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def reference(case: Case) -> str:
    """What computes in float64 on the CPU: the loop over tokens, or for long sequences the fastest of the others."""
    if not isinstance(case, Scan):
        return "torch"
    if case.length <= 1_000:
        return "reference"
    return "native" if available_backends()["native"] is None else "torch"


def refuse_a_wrong_order(bench: Bench) -> None:
    """A path that meets a token twice, or one that is not there, is an error and not an access beyond memory."""
    case = Scan(1, 8, 12, image=(3, 4))
    given = dict(zip(case.names, case.inputs(torch.float32, bench.device, CPU), strict=True))

    def refused(token: int) -> dict[str, Any]:
        order = torch.arange(12, dtype=torch.int32).repeat(4, 1)
        order[2, 5] = token
        try:
            directional_scan(**given, delta_softplus=True, order=order.to(bench.device))
        except LightNetsError:
            return {"ok": "yes"}
        return {"ok": "no"}

    for text, token in (("a token twice", 3), ("a token that is not there", 10**6)):
        bench.rows.measure(("order", text, CHOSEN, "float32"), partial(refused, token), 2)


def capture(bench: Bench) -> None:
    """Scan and convolution in a CUDA graph, replayed on new numbers."""
    cases = TOY_CASES if bench.toy else CASES
    for case in cases[:5]:
        names = (case.operator, str(case), "CUDA graph", "float32")
        bench.rows.measure(names, partial(replayed, case, bench.device), 6)


def replayed(case: Case, device: torch.device) -> dict[str, Any]:
    """A captured forward and backward pass on other numbers than it was captured with."""
    inputs = case.inputs(torch.float32, device, CPU)
    numbers = [x.clone() for x in inputs]
    wanted = [x.clone() for x in results(case, inputs, CHOSEN)]
    found: list[Tensor] = []

    def call() -> None:
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = case.compute(leaves)
        found[:] = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]

    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in wanted[: len(wanted) - len(inputs)]]
    for x in inputs:
        x.mul_(0.5)
    replay = captured(call, device)
    for x, number in zip(inputs, numbers, strict=True):
        x.copy_(number)
    replay()
    errors = [relative_error(x, y) for x, y in zip(found, wanted, strict=True)]
    n_outputs = len(errors) - len(inputs)
    return judged(max(errors[:n_outputs]), max(errors[n_outputs:]), "", (TOLERANCE["float32"],) * 2)


# ---- Networks ----


def compare_networks(bench: Bench, way: str, networks: Sequence[tuple[str, int]] = ()) -> None:
    """Rows of networks, all if none are named, in one way to run them."""
    output, gradient, seconds = NETWORK_WAYS[way]
    for name, dims in networks or ((("lightm_unet", 3), ("ulite", 2)) if bench.toy else tuple(all_networks())):
        patch = (8,) * dims if bench.toy else (64, 64) if dims == 2 else (32, 32, 32)
        names = (name, "×".join(map(str, patch)), way, "float32" if "AMP" not in way else "autocast")
        compute = partial(judged_network, name, patch, way, bench, (output, gradient))
        bench.rows.measure(names, compute, 1 if bench.toy else seconds)


def judged_network(
    name: str, patch: Sequence[int], way: str, bench: Bench, tolerances: Sequence[float | None]
) -> dict[str, Any]:
    """Values of a network's row."""
    return judged(*compare_network(name, patch, way, bench), tolerances)


def all_networks() -> Iterator[tuple[str, int]]:
    """Names and dimensions, those with scans first."""
    scanned = ("lightm_unet", "swin_umamba", "swin_umamba_d", "umamba_bot", "umamba_enc")
    both = [(name, dims) for dims in (3, 2) for name in list_networks(dims)]
    return chain((x for x in both if x[0] in scanned), (x for x in both if x[0] not in scanned))


def compare_network(name: str, patch: Sequence[int], way: str, bench: Bench) -> tuple[float, float | None, str]:
    """Errors of the output and of the gradients, and the parameter with the largest part in the latter's."""
    torch.manual_seed(0)
    settings = {"patch_size": tuple(patch)} if name in ("umamba_enc", "unetr") else {}
    network = create_network(name, spatial_dims=len(patch), input_channels=2, num_classes=3, **settings).eval()
    other = copy.deepcopy(network).to(bench.device)
    x = torch.randn(1, 2, *patch)
    if way == "prediction":
        with torch.inference_mode(), without_tf32():
            found, wanted = prepare_for_inference(other)(x.to(bench.device)), network(x)
        return relative_error(found, wanted), None, ""
    grad = torch.randn(1, 3, *patch) / 3 / x[0, 0].numel()
    half = torch.float16 if bench.device.type == "cuda" else torch.bfloat16  # float16 takes minutes on a CPU
    outputs, gradients = forward_and_backward(network, x, grad, nullcontext)
    compiled = torch.compile(other, backend="aot_eager" if bench.toy else "inductor") if "compiled" in way else other
    with ExitStack() as stack:
        if "AMP" not in way:
            stack.enter_context(without_tf32())
        autocast = (lambda: torch.autocast(bench.device.type, half)) if "AMP" in way else nullcontext
        found_outputs, found_gradients = forward_and_backward(
            compiled, x.to(bench.device), grad.to(bench.device), autocast
        )
    differences = [(a.double().cpu() - b.double()).norm() for a, b in zip(found_gradients, gradients, strict=True)]
    difference = torch.stack(differences)
    names = [key for key, parameter in network.named_parameters() if parameter.grad is not None]
    size = torch.stack([b.double().norm() for b in gradients]).norm()
    error = float(difference.norm() / size)
    return relative_error(found_outputs, outputs), error, names[int(difference.argmax())]


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions compute float32 in float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def forward_and_backward(
    network: nn.Module, x: Tensor, grad: Tensor, autocast: Callable[[], Any]
) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradients of all parameters that have one."""
    with autocast():
        output = network(x)
    (output.float() * grad * _SCALE).sum().backward()
    return output.detach(), [p.grad / _SCALE for p in network.parameters() if p.grad is not None]
