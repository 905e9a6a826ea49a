"""The operator of a whole Mamba layer: values and gradients of the plain steps, what it keeps, how torch sees it."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_lightnets import LightNetsError
from nnunetv2_lightnets.ops import causal_conv1d, mamba_layer, selective_scan, token_moments, use_backend
from nnunetv2_lightnets.ops.flops import register_flop_formulas
from nnunetv2_lightnets.ops.library import WORKSPACE
from nnunetv2_lightnets.ops.mamba_layer import Layer, by_torch, native, operator
from nnunetv2_lightnets.ops.mamba_layer.record import TENSORS
from nnunetv2_lightnets.ops.selective_scan import chunked, dispatch, reference

OPERATORS = torch.ops.nnunetv2_lightnets
GROUP, NORM = ("group_weight", "group_bias"), ("norm_weight", "norm_bias")
AROUND = ("skip_scale", "proj_weight", "proj_bias")
OPTIONS = {  # parts that are left out
    "whole": (),
    "no group norm": GROUP,
    "U-Mamba's": (*GROUP, *AROUND),
    "the block alone": (*GROUP, *NORM, *AROUND),
    "no norms": (*GROUP, *NORM),
    "no bias": ("proj_bias",),
}


@pytest.fixture(params=["by_torch", "native"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both backends in turn; the other one must not be asked."""
    if request.param == "by_torch":
        monkeypatch.setattr(native, "takes", lambda layer: False)
        return by_torch
    if not native.takes(make()):
        pytest.skip("the kernel is not there")
    return native


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 9 tokens, or of 64 in the native backend, so that short sequences have several."""
    monkeypatch.setitem(token_moments.NUMBERS, "cpu", 1)
    monkeypatch.setattr(token_moments, "FEWEST", 9)
    monkeypatch.setattr(native, "run_length", lambda layer: 64)


def make(
    batch: int = 2,
    length: int = 40,
    channels: int = 8,
    *,
    out: int = 6,
    state: int = 4,
    kernel: int = 4,
    without: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Layer:
    """A layer with all parts but some, whose parameters are as those of trained ones; they are leaves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        x = scale * torch.randn(*shape, generator=generator, dtype=torch.float64) + offset
        return x.to(dtype).requires_grad_()

    inner, rank = 2 * channels, 2
    tensors = {
        "tokens": normal(batch, length, channels, offset=0.5),
        "group_weight": normal(channels, scale=0.3, offset=1),
        "group_bias": normal(channels, scale=0.3),
        "norm_weight": normal(channels, scale=0.3, offset=1),
        "norm_bias": normal(channels, scale=0.3),
        "in_weight": normal(2 * inner, channels, scale=channels**-0.5),
        "conv_weight": normal(inner, kernel, scale=0.5),
        "conv_bias": normal(inner, scale=0.3),
        "x_weight": normal(rank + 2 * state, inner, scale=inner**-0.5),
        "dt_weight": normal(inner, rank, scale=0.5),
        "dt_bias": normal(inner, scale=0.5, offset=-2),
        "A_log": normal(inner, state, scale=0.5),
        "D": normal(inner, scale=0.3, offset=1),
        "out_weight": normal(channels, inner, scale=inner**-0.5),
        "skip_scale": normal(1, offset=1),
        "proj_weight": normal(out, channels, scale=channels**-0.5),
        "proj_bias": normal(out),
    }
    return Layer(**{name: x for name, x in tensors.items() if name not in without}, groups=4)


def plain(layer: Layer) -> Tensor:
    """The layer step by step for all tokens at once, as networks were written before."""
    channels, state = layer.tokens.shape[2], layer.A_log.shape[1]
    wide = torch.float64 if layer.tokens.dtype == torch.float64 else torch.float32
    product = layer.low or layer.tokens.dtype
    dtype = layer.tokens.dtype if layer.low is None else wide

    def norm(x: Tensor) -> Tensor:
        if layer.norm_weight is None:
            return x
        return F.layer_norm(x, (channels,), layer.norm_weight, layer.norm_bias, layer.norm_eps)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x.to(product), weight.to(product), None if bias is None else bias.to(product))

    x = layer.tokens.to(dtype)
    if layer.group_weight is not None and layer.group_bias is not None:
        weight, bias = layer.group_weight.to(wide), layer.group_bias.to(wide)
        x = F.group_norm(layer.tokens.to(wide).mT, layer.groups, weight, bias, layer.group_eps).mT.relu().to(dtype)
    xi, z = linear(norm(x), layer.in_weight).chunk(2, -1)
    u = causal_conv1d(xi.mT, layer.conv_weight, layer.conv_bias, activation="silu").mT
    dt, b, c = linear(u, layer.x_weight).split((layer.dt_weight.shape[1], state, state), -1)
    delta = linear(dt, layer.dt_weight)
    u, delta, b, c, z = (x.to(wide).mT for x in (u, delta, b, c, z))
    A, D, bias = -layer.A_log.to(wide).exp(), layer.D.to(wide), layer.dt_bias.to(wide)
    y = selective_scan(u, delta, A, b, c, D, z, bias, True).mT.to(dtype)
    mixed = F.linear(y, layer.out_weight.to(dtype))
    if layer.proj_weight is None:
        return mixed
    return linear(norm(mixed + layer.skip_scale * x), layer.proj_weight, layer.proj_bias)


def gradients(function: Callable[[Layer], Tensor], layer: Layer, grad: Tensor | None = None) -> dict[str, Tensor]:
    """The output and the gradients of all tensors that are there, by name."""
    out = function(layer)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype) if grad is None else grad
    names = [name for name in TENSORS if getattr(layer, name) is not None and getattr(layer, name).requires_grad]
    found = torch.autograd.grad(out, [getattr(layer, name) for name in names], grad)
    return {"output": out.detach(), **dict(zip(names, found, strict=True))}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest number of each."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape and found[name].dtype == wanted.dtype, name
        error, scale = (found[name].double() - wanted.double()).abs().max(), wanted.double().abs().max()
        assert error <= tolerance * scale, (name, (error / scale).item())


# ---- Values and gradients ----


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("without", OPTIONS.values(), ids=OPTIONS)
def test_it_is_the_plain_steps(without, batch, dtype, tolerance):
    """In runs of 9, 9, 9, 9 and 2 tokens: the last one is shorter than what the convolution sees before it."""
    layer = make(batch, 38, without=without, dtype=dtype)
    assert_equal(gradients(mamba_layer, layer), gradients(plain, layer), tolerance)


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("length", [1, 2, 9, 10, 18, 300])
def test_lengths_that_runs_divide_or_not(length):
    layer = make(2, length, dtype=torch.float64)
    assert_equal(gradients(mamba_layer, layer), gradients(plain, layer), 1e-10)


@pytest.mark.parametrize("length", [1, 3, 40])
def test_several_sequences_in_one_run(length, monkeypatch):
    """Two of three at once, and the third."""
    layer = make(3, length, dtype=torch.float64)
    monkeypatch.setattr(token_moments, "FEWEST", 2 * length + 1)
    monkeypatch.setitem(token_moments.NUMBERS, "cpu", 1)
    assert_equal(gradients(mamba_layer, layer), gradients(plain, layer), 1e-10)


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("kernel", [1, 2, 7])
def test_kernel_sizes(kernel):
    layer = make(2, 31, kernel=kernel, state=3, dtype=torch.float64)
    assert_equal(gradients(mamba_layer, layer), gradients(plain, layer), 1e-10)


@pytest.mark.usefixtures("short_runs")
def test_tokens_and_gradients_of_any_strides():
    """As channels-first features come from U-Mamba, and as a sum's gradient comes."""
    tokens = torch.randn(2, 8, 30, dtype=torch.float64).mT.requires_grad_()
    layer = replace(make(2, 30, dtype=torch.float64), tokens=tokens)
    for grad in (torch.ones((), dtype=torch.float64).expand(2, 30, 6), torch.randn(2, 6, 30, dtype=torch.float64).mT):
        found = gradients(mamba_layer, layer, grad)
        assert_equal(found, gradients(plain, layer, grad), 1e-10)
        assert found["tokens"].stride() == tokens.stride()


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("without", [(), OPTIONS["U-Mamba's"]], ids=["whole", "U-Mamba's"])
def test_gradients_are_those_of_the_function(without):
    layer = make(1, 11, channels=4, out=2, state=2, kernel=3, without=without, dtype=torch.float64)
    names = [name for name in TENSORS if getattr(layer, name) is not None]

    def run(*tensors: Tensor) -> Tensor:
        return mamba_layer(replace(layer, **dict(zip(names, tensors, strict=True))))

    assert torch.autograd.gradcheck(run, [getattr(layer, name) for name in names])


def test_large_offsets_keep_their_digits():
    """Tokens whose mean is 50 times their deviation: no more digits are lost than these have."""
    layer = make(1, 600, dtype=torch.float32)
    layer = replace(layer, tokens=(layer.tokens + 50).detach().requires_grad_())
    exact = replace(layer, **{n: getattr(layer, n).detach().double().requires_grad_() for n in TENSORS})
    found, expected = gradients(mamba_layer, layer), gradients(plain, exact)
    del found["skip_scale"], expected["skip_scale"]  # a sum of which little is left, whatever computes it
    assert_equal(found, {name: x.float() for name, x in expected.items()}, 1e-4)


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("frozen", [("tokens",), ("in_weight", "A_log", "norm_weight"), TENSORS[1:]])
def test_frozen_parts_get_no_gradient_and_change_none(frozen):
    layer = make(2, 20, dtype=torch.float64)
    expected = gradients(plain, layer)
    layer = replace(layer, **{name: getattr(layer, name).detach() for name in frozen})
    found = gradients(mamba_layer, layer)
    assert_equal(found, {name: x for name, x in expected.items() if name not in frozen}, 1e-10)


# ---- Precision ----


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("without", [(), OPTIONS["U-Mamba's"]], ids=["whole", "U-Mamba's"])
def test_autocast(dtype, without):
    """Low precision where the plain steps have it, and nowhere else: rounded alike, up to the order of sums."""
    layer = replace(make(2, 40, without=without), low=dtype)
    found, expected = gradients(mamba_layer, layer), gradients(plain, layer)
    assert found["output"].dtype == (torch.float32 if without else dtype)
    assert_equal(found, expected, 4 * torch.finfo(dtype).eps)
    exact = gradients(plain, replace(layer, low=None))
    assert_equal({k: x.float() for k, x in found.items()}, exact, 40 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_autocast_reaches_no_further(inputs):
    """Inside the operator nothing is cast that the record does not say."""
    layer = make(1, 40)
    layer = replace(layer, low=torch.bfloat16, tokens=layer.tokens.detach().to(inputs).requires_grad_())
    expected = gradients(mamba_layer, layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(mamba_layer, layer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["tokens"].dtype == inputs and found["in_weight"].dtype == torch.float32


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    exact = make(2, 40)
    layer = replace(exact, **{name: getattr(exact, name).detach().to(dtype).requires_grad_() for name in TENSORS})
    found, expected = gradients(mamba_layer, layer), gradients(plain, layer)
    assert found["output"].dtype == dtype
    assert_equal(found, expected, 8 * torch.finfo(dtype).eps)


def test_sums_over_many_runs_keep_their_digits(short_runs):
    """Gradients of half-precision weights are summed in float32."""
    exact = make(1, 3000, without=(*GROUP, *AROUND))
    names = [name for name in TENSORS if getattr(exact, name) is not None]
    layer = replace(exact, **{name: getattr(exact, name).detach().bfloat16().requires_grad_() for name in names})
    again = replace(layer, **{name: getattr(layer, name).detach().float().requires_grad_() for name in names})
    found, expected = gradients(mamba_layer, layer), gradients(plain, again)
    for name in ("in_weight", "out_weight", "D", "conv_bias"):
        error = (found[name].float() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 0.02, name


# ---- What is kept, and what is allocated ----


class Numbers(torch.utils._python_dispatch.TorchDispatchMode):
    """Numbers of the largest tensor that is made, and the most bytes of storages alive at once, but for those given."""

    def __init__(self, *given: Tensor | None) -> None:
        super().__init__()
        self._given = {x.untyped_storage()._cdata for x in given if x is not None}
        self.largest = self.bytes = self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._given:
            return

        def freed(_: Any) -> None:
            self.bytes -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def test_only_its_own_tensors_and_small_ones_are_saved(short_runs):
    layer = make(2, 500)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        mamba_layer(layer)
    own = {getattr(layer, name).data_ptr() for name in TENSORS}
    others = [x for x in saved if x.data_ptr() not in own]
    assert len(saved) - len(others) == len(TENSORS)
    assert all(x.numel() <= layer.tokens.numel() for x in saved)
    assert len(others) == 3  # states, moments, the backend
    states, moments, used = others
    assert used.numel() == 1 and moments.shape == (2, 4, 2)
    if operator._backend(layer) is by_torch:
        assert states.numel() == by_torch.saved_numbers(layer) == 2 * 55 * layer.A_log.numel()


def test_no_tensor_of_the_inner_width_exists_for_all_tokens(backend):
    """Nor anything else that is larger than the input, forwards and backwards."""
    layer = make(1, 2**17, 16, out=16, state=16)
    with torch.no_grad(), Numbers() as seen:
        out, states, moments = backend.forward(layer, True)
        backend.backward(layer, torch.ones_like(out), states, moments)
    assert seen.largest == layer.tokens.numel()


@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("without", [(), OPTIONS["U-Mamba's"]], ids=["whole", "U-Mamba's"])
def test_workspace_is_what_is_allocated(backend, without, low):
    """Beside results, within 10 %; several runs, of the length that they usually have."""
    if backend is native:
        pytest.skip("C allocates where torch does not see it: tests/ops/test_mamba_native.py")
    layer = replace(make(2, 20000, 32, out=32, state=16, without=without), low=low)
    arguments, backwards = operator.arguments(layer), "mamba_layer_backward"
    with torch.no_grad(), Numbers(*layer.tensors()) as forward:
        results = backend.forward(layer, True)
    grad = torch.ones_like(results[0])
    taken = forward.peak - sum(x.nbytes for x in results)
    assert WORKSPACE["mamba_layer"](*arguments, True, False) == pytest.approx(taken, rel=0.1)
    with torch.no_grad(), Numbers(*layer.tensors(), grad, *results) as backward:
        gradients = backend.backward(layer, grad, *results[1:])
    taken = backward.peak - sum(x.nbytes for x in gradients if x is not None)
    assert WORKSPACE[backwards](grad, *arguments, *results[1:], torch.zeros(())) == pytest.approx(taken, rel=0.1)
    with torch.device("meta"):
        names = [name for name in TENSORS if getattr(layer, name) is not None]
        shapes = {name: torch.empty_like(getattr(layer, name)) for name in names}
        planned = WORKSPACE[backwards](shapes["tokens"], *operator.arguments(replace(layer, **shapes)), device="cuda")
    assert planned > taken  # runs are longer on a GPU


def test_nothing_is_saved_without_gradients():
    layer = make(2, 500)
    with torch.no_grad():
        assert not mamba_layer(layer).requires_grad
    arguments = operator.arguments(layer)
    assert OPERATORS.mamba_layer(*arguments, False, False)[1].numel() == 0


# ---- As torch sees it ----


def compiled(function: Callable[[Layer], Tensor]) -> Callable[[Layer], Tensor]:
    def run(layer: Layer) -> Tensor:
        names = [name for name in TENSORS if getattr(layer, name) is not None]

        def on_tensors(tensors: list[Tensor]) -> Tensor:
            return 2 * function(replace(layer, **dict(zip(names, tensors, strict=True))))

        torch._dynamo.reset()
        graph = torch.compile(on_tensors, backend="aot_eager", fullgraph=True, dynamic=False)
        return graph([getattr(layer, name) for name in names]) / 2

    return run


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_compiles_as_one_graph(low):
    layer = replace(make(2, 40), low=low)
    assert_equal(gradients(compiled(mamba_layer), layer), gradients(mamba_layer, layer), 0.02 if low else 1e-6)


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("without", [(), OPTIONS["U-Mamba's"]], ids=["whole", "U-Mamba's"])
def test_opcheck(without, backend):
    layer = make(2, 20, without=without)
    arguments = operator.arguments(layer)
    opcheck(OPERATORS.mamba_layer.default, (*arguments, True, False))
    out, *saved = OPERATORS.mamba_layer(*(x.detach() if isinstance(x, Tensor) else x for x in arguments), True, False)
    opcheck(
        OPERATORS.mamba_layer_backward.default,
        (torch.ones_like(out), *(x.detach() if isinstance(x, Tensor) else x for x in arguments), *saved),
    )


class Module(nn.Module):
    """A layer as a module."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = replace(layer, tokens=layer.tokens.detach())
        for name in TENSORS[1:]:
            setattr(self, name, nn.Parameter(getattr(layer, name).detach().clone()))

    def forward(self, tokens: Tensor) -> Tensor:
        return mamba_layer(
            Layer(tokens=tokens, **{name: getattr(self, name) for name in TENSORS[1:]}, groups=self.layer.groups)
        )


def test_copies_of_a_module_are_trained_apart():
    layer = make(2, 20)
    module = Module(layer)
    other = copy.deepcopy(module)
    x = layer.tokens.detach()
    module(x).square().sum().backward()
    assert all(p.grad is None for p in other.parameters())
    other(x).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(module.parameters(), other.parameters(), strict=True))
    (module(x) + module(x)).square().sum().backward()  # twice in a graph


def test_exports_with_any_length():
    module, length = Module(make(2, 40)), torch.export.Dim("length", min=2, max=1 << 20)
    with torch.no_grad():
        program = torch.export.export(module, (make(2, 40).tokens.detach(),), dynamic_shapes=[{1: length}])
        for other in (2, 64, 333):
            tokens = torch.randn(2, other, 8)
            torch.testing.assert_close(program.module()(tokens), module(tokens), rtol=0, atol=0)


def test_shapes_are_known_without_memory():
    with torch.device("meta"):
        layer = Layer(**{name: torch.empty(getattr(make(), name).shape) for name in TENSORS}, groups=4)
    assert mamba_layer(layer).shape == (2, 40, 6)


def test_gradients_from_another_thread_use_what_was_forced(monkeypatch, backend):
    """And threads at work at the same time do not disturb each other."""
    if backend is native:
        pytest.skip("nothing is forced")
    used = []
    for module in (reference, chunked):
        for way in ("forward", "backward"):
            original, name = getattr(module, way), f"{module.NAME} {way}"
            monkeypatch.setattr(module, way, lambda *a, f=original, name=name: used.append(name) or f(*a))
    layer = make(1, 12)
    with use_backend("reference"):
        out = mamba_layer(layer)
    with use_backend("torch"):
        thread = threading.Thread(target=out.sum().backward)
        thread.start()
        thread.join()
    assert used == ["reference forward", "reference forward", "reference backward"]


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("compile_it", [False, True])
@pytest.mark.parametrize("forced", ["mamba_ssm", "hub"])
def test_scans_that_start_at_zero_take_a_sequence_as_one_run(forced, compile_it, monkeypatch, backend):
    """As mamba-ssm's kernel does, for which "torch" stands in here."""
    if backend is native:
        pytest.skip("it does not scan by others")
    scans: list[Any] = []
    kernel = dispatch._load(forced)
    monkeypatch.setattr(kernel, "unavailable", lambda: None)
    monkeypatch.setattr(kernel, "refuses", lambda scan: "an initial_state" if scan.initial_state is not None else None)
    monkeypatch.setattr(kernel, "forward", lambda scan, save: scans.append(scan) or chunked.forward(scan, save))
    monkeypatch.setattr(kernel, "backward", chunked.backward)
    layer = make(2, 40, dtype=torch.float64)
    expected = gradients(plain, layer)
    function = compiled(mamba_layer) if compile_it else mamba_layer
    with use_backend(forced):
        out = function(layer)
    names = [name for name in TENSORS if getattr(layer, name) is not None]
    found = torch.autograd.grad(out.square().sum(), [getattr(layer, name) for name in names])
    assert {scan.u.shape[2] for scan in scans} == {40}
    wanted = torch.autograd.grad(plain(layer).square().sum(), [getattr(layer, name) for name in names])
    assert_equal(dict(zip(names, found, strict=True)), dict(zip(names, wanted, strict=True)), 1e-10)
    torch.testing.assert_close(out, expected["output"], rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("short_runs")
def test_two_threads():
    layers = [make(2, 60, seed=seed) for seed in (0, 1)]
    expected, found = [gradients(mamba_layer, layer) for layer in layers], {}

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = gradients(mamba_layer, layers[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert all(torch.equal(found[i][name], expected[i][name]) for name in expected[i])


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("without", OPTIONS.values(), ids=OPTIONS)
def test_flops_are_those_of_the_plain_steps(without):
    register_flop_formulas()
    layer = make(2, 20, without=without)

    def flops(function: Callable[[Layer], Tensor]) -> tuple[int, int]:
        with FlopCounterMode(display=False) as forward:
            out = function(layer)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    assert flops(mamba_layer) == flops(plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 8)}, "tokens are"),
        ({"tokens": torch.zeros(2, 0, 8)}, "not empty"),
        ({"tokens": torch.zeros(2, 5, 8, dtype=torch.float64)}, "convert the module or the input"),
        ({"x_weight": torch.zeros(9, 16)}, r"x_weight has shape \(9, 16\), expected \(10, 16\)"),
        ({"group_bias": None}, "group_weight and group_bias must be given both, or neither"),
        ({"skip_scale": None}, "skip_scale and proj_weight must be given both, or neither"),
        ({"groups": 3}, "8 channels do not fall into 3 groups"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(LightNetsError, match=message) as error:
        mamba_layer(replace(make(), **change))
    assert "\n" not in str(error.value)


def test_gradients_of_gradients_are_refused():
    layer = make(1, 10)
    (grad,) = torch.autograd.grad(mamba_layer(layer).sum(), layer.tokens, create_graph=True)
    with pytest.raises(LightNetsError, match="gradients of gradients"):
        grad.sum().backward()
